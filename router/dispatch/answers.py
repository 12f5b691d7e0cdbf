"""Answers kept for their idempotency keys: one request runs, its retries get the same bytes. A plain object, no I/O.

A key is *claimed* by the first front that brings it, until that front keeps an answer or gives the claim up; then the
next one that waits is first. What is kept stays `KEEP_SECONDS`. Bounded: the oldest answers go first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from router.dispatch.lease import Claim, Claimed, Keep, Verdict

KEEP_SECONDS = 60.0
MAX_CLAIMS = 10_000  # keys that run
MAX_KEPT = 10_000
MAX_KEPT_BYTES = 64 << 20
MAX_ANSWER_BYTES = 1 << 20  # a larger answer is not kept


@dataclass(slots=True)
class _Running:
    body: bytes
    client: str
    waiting: deque[tuple[str, int]] = field(default_factory=deque)  # (client, number)
    gone_at: float | None = None  # since when its client is away


@dataclass(frozen=True, slots=True)
class _Kept:
    body: bytes
    answer: bytes
    until: float


Told = list[tuple[str, Claimed]]  # (client, message)


class KeptAnswers:
    """`clock` gives monotonic seconds. A claim whose front is away for `grace` seconds is given up."""

    def __init__(self, clock: Callable[[], float], grace: float) -> None:
        self._clock, self._grace = clock, grace
        self._running: dict[bytes, _Running] = {}
        self._kept: dict[bytes, _Kept] = {}  # oldest first
        self.bytes = 0

    def claim(self, client: str, asked: Claim) -> Told:
        """The verdict, unless it waits for the one that runs: then it comes out of a later call."""
        if not asked.number:
            return self._claim_again(client, asked)
        kept = self._kept.get(asked.key)
        if kept is not None and kept.until > self._clock():
            if kept.body != asked.body:
                return [(client, Claimed(asked.number, asked.key, Verdict.OTHER_BODY))]
            return [(client, Claimed(asked.number, asked.key, Verdict.KEPT, kept.answer))]
        running = self._running.get(asked.key)
        if running is None:
            if len(self._running) >= MAX_CLAIMS:
                return [(client, Claimed(asked.number, asked.key, Verdict.FULL))]
            self._running[asked.key] = _Running(asked.body, client)
            return [(client, Claimed(asked.number, asked.key, Verdict.FIRST))]
        if running.body != asked.body:
            return [(client, Claimed(asked.number, asked.key, Verdict.OTHER_BODY))]
        if not asked.wait:
            return [(client, Claimed(asked.number, asked.key, Verdict.RUNNING))]
        running.waiting.append((client, asked.number))
        return []

    def _claim_again(self, client: str, asked: Claim) -> Told:
        """It was first before we, or our connection, were away; it goes on unless another one has begun since."""
        running = self._running.setdefault(asked.key, _Running(asked.body, client))
        if running.client == client:
            running.gone_at = None
        return []

    def keep(self, client: str, done: Keep) -> Told:
        """The request of the key has ended; an empty answer is not kept, and neither is one that is too large."""
        running = self._running.get(done.key)
        if running is not None and running.client != client:
            return []  # its claim was given up while it was away, and another one runs
        waiting = running.waiting if running is not None else deque()
        if not done.answer or len(done.answer) > MAX_ANSWER_BYTES:
            return self._hand_on(done.key)
        self._running.pop(done.key, None)
        self._forget(done.key)
        self._kept[done.key] = _Kept(done.body, done.answer, self._clock() + KEEP_SECONDS)
        self.bytes += len(done.answer)
        while self.bytes > MAX_KEPT_BYTES or len(self._kept) > MAX_KEPT:
            self._forget(next(iter(self._kept)))
        return [(to, Claimed(number, done.key, Verdict.KEPT, done.answer)) for to, number in waiting]

    def client_gone(self, client: str) -> None:
        """It is away: it waits for nothing any more, and may come back and claim again what runs there."""
        now = self._clock()
        for running in self._running.values():
            running.waiting = deque(w for w in running.waiting if w[0] != client)
            if running.client == client:
                running.gone_at = now

    def tick(self) -> Told:
        """What follows from time alone."""
        now = self._clock()
        while self._kept and (oldest := next(iter(self._kept.items())))[1].until <= now:
            self._forget(oldest[0])
        lost = [k for k, r in self._running.items() if r.gone_at is not None and now - r.gone_at >= self._grace]
        return [told for key in lost for told in self._hand_on(key)]

    def __len__(self) -> int:
        return len(self._kept)

    def _hand_on(self, key: bytes) -> Told:
        """The claim of `key` ends without an answer: the next in line is first, if there is one."""
        running = self._running.pop(key, None)
        if running is None or not running.waiting:
            return []
        client, number = running.waiting.popleft()
        self._running[key] = _Running(running.body, client, running.waiting)
        return [(client, Claimed(number, key, Verdict.FIRST))]

    def _forget(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.bytes -= len(kept.answer)
