"""A batch job: lines in, records out, so many at once, again where the server was busy, until all are done or it is
told to stop.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from cluster.batch.journal import Journal
from cluster.batch.lines import BadLine, Line, Record, answered, not_answered, retry_after, to_be_retried
from cluster.batch.transport import Transport
from cluster.http_client import UNAUTHORIZED, AnswerTimeout, NoAccess, Unreachable, no_access
from router.service import Reply

FIRST_DELAY, LAST_DELAY = 0.25, 30.0  # seconds between attempts, where the server does not say how long
LOOK_SECONDS = 0.1  # how soon a stop is noticed


@dataclass(frozen=True, slots=True)
class Retry:
    """When a refused line is tried again: for `patience` seconds since it was first refused, ever less often."""

    patience: float
    first: float = FIRST_DELAY
    last: float = LAST_DELAY

    def delay(self, attempt: int, asked: float, spread: float) -> float:
        """Seconds after attempt `attempt` (from 0); `asked` by the server; `spread` in [0, 1) parts the crowd."""
        own = min(self.last, math.ldexp(self.first, min(attempt, 32)))
        return max(asked, own) * (1 + spread / 4)


class _Stopped(Exception):
    """The job was told to stop before this line had its answer."""


class BatchJob:
    """Runs lines on `transport` and writes them to `journal`, `concurrency` at once."""

    def __init__(
        self,
        transport: Transport,
        journal: Journal,
        *,
        concurrency: int,
        retry: Retry,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._transport, self._journal = transport, journal
        self._concurrency, self._retry, self._clock = concurrency, retry, clock
        self._rng = rng or random.Random()
        self._asked_to_stop = False  # not the event: a signal handler must not wait for its lock
        self._stop = threading.Event()
        self._running: set[Future[Record]] = set()
        self._on_record: Callable[[Record], None] = lambda record: None
        self.skipped = 0  # lines that were done before

    def stop(self) -> None:
        """`run` returns soon; what is under way is given up. Signal handlers and other threads may call it."""
        self._asked_to_stop = True

    def run(self, lines: Iterable[Line | BadLine], on_record: Callable[[Record], None]) -> bool:
        """Whether all `lines` are in the journal; False after `stop`. `on_record` hears of each new one.

        Raises Unreachable when there was no server for the whole patience, NoAccess when the key is not taken, and
        EchelonError when the journal cannot be written; in each case the journal is good, and the same job can be run
        again. One run for each object.
        """
        self._on_record = on_record
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="batch") as pool:
            try:
                for line in lines:
                    if self._asked_to_stop:
                        break
                    if line.key in self._journal.done:
                        self.skipped += 1
                    elif isinstance(line, BadLine):
                        self._write(not_answered(line, "invalid_line", line.message))
                    else:
                        self._await_room(self._concurrency - 1)
                        self._running.add(pool.submit(self._ask, line))
                self._await_room(0)
            except Unreachable:
                self._give_up()
                raise
            except BaseException:
                self._abort()
                raise
            if self._asked_to_stop:
                self._give_up()
                return False
        return True

    def _await_room(self, most: int) -> None:
        """At most `most` lines are under way, or the job is asked to stop. Raises Unreachable."""
        while len(self._running) > most and not self._asked_to_stop:
            done = wait(self._running, LOOK_SECONDS, FIRST_COMPLETED).done
            self._running -= done
            failures = [e for e in map(self._take, done) if e is not None]
            if failures:
                raise failures[0]

    def _take(self, future: Future[Record]) -> BaseException | None:
        """The record is written, or else its failure is returned."""
        failure = future.exception()
        if failure is None:
            self._write(future.result())
        return failure

    def _write(self, record: Record) -> None:
        self._journal.append(record)
        self._on_record(record)

    def _abort(self) -> None:
        self._stop.set()
        self._transport.abort()
        wait(self._running)

    def _give_up(self) -> None:
        """Nothing is under way any more; what was answered in the meantime is written."""
        self._abort()
        for future in self._running:
            failure = self._take(future)
            if failure is not None and not isinstance(failure, _Stopped | Unreachable):
                raise failure

    def _ask(self, line: Line) -> Record:
        refused_since: float | None = None
        attempt = 0
        while not self._stop.is_set():
            asked = 0.0
            reply: Reply | None = None
            lost: Unreachable | None = None
            try:
                reply = self._transport.send(line.route, line.body)
                if reply.status == UNAUTHORIZED:  # of the key, not of the line: with a good one it can be run
                    raise no_access("the server", reply.body)
                if not to_be_retried(reply):
                    return answered(line, reply)
                asked = retry_after(reply)
            except NoAccess:
                raise
            except AnswerTimeout as e:
                return not_answered(line, "timeout", str(e))
            except Unreachable as e:
                lost = e
            now = self._clock()
            refused_since = now if refused_since is None else refused_since
            if now - refused_since >= self._retry.patience and not self._stop.is_set():
                if reply is not None:
                    return answered(line, reply)
                assert lost is not None
                raise lost
            self._stop.wait(self._retry.delay(attempt, asked, self._rng.random()))
            attempt += 1
        raise _Stopped
