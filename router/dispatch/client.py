"""An ingress replica's side of the dispatcher: leases, over one connection that comes back by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from time import monotonic
from typing import Any

from router.dispatch.lease import (
    DISPATCH_CODEC,
    Acquire,
    Cancel,
    Claimed,
    FrontPages,
    Granted,
    HeldLease,
    Keep,
    LeaseLost,
    NodeAnswer,
    Outcome,
    Refusal,
    Refused,
    ReplicaRow,
    ReplicaTable,
    Reregister,
    Settle,
    Story,
    Verdict,
)
from router.dispatch.rounds import Begun, EndRound, RoundBegun, RoundCancelled, StopRound
from workers.api.channel import Channel, dial
from workers.api.errors import (
    ContextLengthExceeded,
    EchelonError,
    InvalidRequest,
    ModelNotFound,
    NoReplica,
    Overloaded,
)

_FIRST_BACKOFF, _LAST_BACKOFF = 0.02, 0.5  # seconds
_LOCATE_SECONDS = 3.0

log = logging.getLogger("echelon.dispatch")

Locate = Callable[[], Awaitable[tuple[str, int]]]
OnLost = Callable[[LeaseLost], None]
Numbered = FrontPages | Claimed | Story | NodeAnswer | RoundBegun | RoundCancelled


@dataclass(slots=True)
class _Wait:
    request: Acquire
    since: float
    answer: asyncio.Future[Granted]
    on_lost: OnLost | None


@dataclass(slots=True)
class _Held:
    request: Acquire
    since: float
    replica_id: str
    on_lost: OnLost | None


def refusal_error(refused: Refused) -> EchelonError:
    """The error that a client of ours sees."""
    match refused.reason:
        case Refusal.UNKNOWN_MODEL:
            return ModelNotFound(refused.message)
        case Refusal.CONTEXT:
            return ContextLengthExceeded(refused.message)
        case Refusal.INVALID:
            return InvalidRequest(refused.message)
        case Refusal.NO_REPLICA:
            return NoReplica(refused.message, retry_after=refused.retry_after)
        case Refusal.OVERLOADED:
            error = Overloaded(refused.message, retry_after=refused.retry_after)
            error.position, error.wait = refused.position, refused.wait
            return error


class DispatcherClient:
    """Leases from the dispatcher that `locate` finds; `name` must be unique among ingress replicas, for ever.

    Without a dispatcher, requests wait up to `patience` seconds for one; leases that are held stay good.
    """

    def __init__(self, name: str, *, secret: str, locate: Locate, patience: float = 10.0) -> None:
        self.name = name
        self._secret, self._locate, self._patience = secret, locate, patience
        self._channel: Channel | None = None
        self._closed = False
        self._proven = False  # whether the peer has said anything: it took our secret
        self._away_since = monotonic()
        self._waiting: dict[str, _Wait] = {}
        self._held: dict[str, _Held] = {}
        self._unsent: list[Settle] = []
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.on_opened: list[Callable[[], None]] = []  # called on each connection, to tell what the dispatcher forgot
        self.on_stop: list[Callable[[StopRound], None]] = []  # called when a round of an interactive session is to end
        self.table = ReplicaTable((), 0)
        self.table_at = float("-inf")  # when it came, monotonic

    def start(self) -> None:
        """Connect, and stay connected, from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected(), name=f"{self.name}: dispatcher")

    async def close(self) -> None:
        """The connection is closed; who still waits, or asks from now on, gets NoReplica."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._fail_waiting("this ingress ends")
        if self._channel is not None:
            self._channel.close("the ingress ends")

    @property
    def connected(self) -> bool:
        """Whether the dispatcher is there."""
        return self._channel is not None and self._channel.is_open

    @property
    def rows(self) -> tuple[ReplicaRow, ...]:
        """The replica table as last heard."""
        return self.table.rows

    @property
    def held(self) -> int:
        """Leases held here."""
        return len(self._held)

    async def acquire(self, request: Acquire, on_lost: OnLost | None = None) -> Granted:
        """A lease; `settle` it. `on_lost` is called, in the event loop, if its replica is declared dead before.

        Cancelling the wait gives the place up. Raises ModelNotFound, InvalidRequest, Overloaded or NoReplica.
        """
        if self._closed:
            raise NoReplica("this ingress ends", retry_after=1.0)
        wait = _Wait(request, monotonic() - request.age, asyncio.get_running_loop().create_future(), on_lost)
        if not self.connected and monotonic() - self._away_since > self._patience:
            raise NoReplica("the dispatcher is not reachable", retry_after=2.0)
        self._waiting[request.lease_id] = wait
        self._send(request)
        try:
            return await wait.answer
        except asyncio.CancelledError:
            if self._waiting.pop(request.lease_id, None) is not None:
                self._send(Cancel(request.lease_id))
            else:  # granted, but nobody is left to take it
                self.settle(Settle(request.lease_id, Outcome.ABORTED))
            if wait.answer.done() and not wait.answer.cancelled():
                wait.answer.exception()  # a refusal that nobody will read
            raise

    def settle(self, settled: Settle) -> bool:
        """The lease has ended; False, and nothing happens, if it had ended before."""
        if self._held.pop(settled.lease_id, None) is None:
            return False
        if self.connected:
            self._send(settled)
        else:
            self._unsent.append(settled)
        return True

    def tell(self, message: Any) -> None:
        """Send what asks for no answer; without a dispatcher it is dropped."""
        if self._channel is not None:
            self._channel.send(message)

    async def ask(self, question: Callable[[int], Any], seconds: float | None = None) -> Any:
        """The dispatcher's answer to `question(number)`: the message that has this number.

        Raises ConnectionError when there is no dispatcher, when it goes away, or after `seconds`.
        """
        if not self.connected:
            raise ConnectionError("the dispatcher is not reachable")
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self.tell(question(number))
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._unread(answer.result())
            raise
        except TimeoutError as e:
            raise ConnectionError(f"the dispatcher has not answered for {seconds} s") from e
        finally:
            del self._asked[number]

    # workers.api.channel.Handler

    def opened(self, channel: Channel) -> None:
        """Tell all that we hold and wait for, before anything new."""
        self._channel, self._proven = channel, False
        now = monotonic()
        for settled in self._unsent:
            channel.send(settled)
        self._unsent.clear()
        held = [
            HeldLease(replace(h.request, age=now - h.since, prompt=None), h.replica_id) for h in self._held.values()
        ]
        waits = sorted(self._waiting.values(), key=lambda w: w.since)
        channel.send(Reregister(tuple(held), tuple(replace(w.request, age=now - w.since) for w in waits)))
        for hook in self.on_opened:
            hook()

    def received(self, channel: Channel, message: object) -> None:
        """An answer, a loss, or the table."""
        self._proven = True
        match message:
            case Granted():
                self._granted(message)
            case Refused():
                wait = self._waiting.pop(message.lease_id, None)
                if wait is not None and not wait.answer.done():
                    wait.answer.set_exception(refusal_error(message))
            case LeaseLost():
                lost = self._held.pop(message.lease_id, None)
                if lost is not None and lost.on_lost is not None:
                    lost.on_lost(message)
            case ReplicaTable():
                self.table, self.table_at = message, monotonic()
            case StopRound():
                for on_stop in self.on_stop:
                    on_stop(message)
            case FrontPages() | Claimed() | Story() | NodeAnswer() | RoundBegun() | RoundCancelled():
                asked = self._asked.get(message.number)
                if asked is not None and not asked.done():
                    asked.set_result(message)
                else:
                    self._unread(message)
            case _:
                channel.close(f"a dispatcher does not send {type(message).__name__}")

    def closed(self, channel: Channel, reason: str) -> None:
        """Go looking for it again."""
        if channel is self._channel:
            log.warning("the dispatcher is gone: %s", reason)
            self._channel = None
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(ConnectionError(f"the dispatcher is gone: {reason}"))
            if self._proven:
                self._away_since = monotonic()
        self._ended.set()

    # inside

    def _granted(self, granted: Granted) -> None:
        wait = self._waiting.pop(granted.lease_id, None)
        if wait is None:
            if granted.lease_id not in self._held:  # cancelled here while it was under way
                self._send(Settle(granted.lease_id, Outcome.ABORTED))
            return
        self._held[granted.lease_id] = _Held(wait.request, wait.since, granted.replica.id, wait.on_lost)
        if wait.answer.done():  # cancelled in this very moment: the waiter settles it when it wakes
            return
        wait.answer.set_result(granted)

    def _send(self, message: Acquire | Settle | Cancel) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _unread(self, message: Numbered) -> None:
        """Whoever asked has left; what it would have been first to run, the next one may."""
        if isinstance(message, RoundBegun) and message.verdict is Begun.BEGUN:
            self.tell(EndRound(message.owner, message.session, message.revision, b"", 0.0))
        if isinstance(message, Claimed) and message.verdict is Verdict.FIRST:
            self.tell(Keep(message.key, b"", b""))

    def _fail_waiting(self, reason: str) -> None:
        for wait in self._waiting.values():
            if not wait.answer.done():
                wait.answer.set_exception(NoReplica(reason, retry_after=2.0))
        self._waiting.clear()

    async def _stay_connected(self) -> None:
        backoff = _FIRST_BACKOFF
        while True:
            self._ended.clear()
            try:
                async with asyncio.timeout(_LOCATE_SECONDS):
                    host, port = await self._locate()
                await dial(host, port, codec=DISPATCH_CODEC, secret=self._secret, name=self.name, handler=self)
                await self._ended.wait()
                if self._proven:
                    backoff = _FIRST_BACKOFF
            except Exception as e:  # `locate` is not ours and may raise anything; the search must go on
                log.info("no dispatcher yet: %s: %s", type(e).__name__, e)
            if monotonic() - self._away_since > self._patience:
                self._fail_waiting("the dispatcher is not reachable")
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF)
