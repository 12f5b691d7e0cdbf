"""Histories of interactive sessions, each with at most one round that runs. A plain object, no I/O.

A front begins a round, gets the history, and ends the round with the new one. What is kept is bounded: for some time
after the last round (which the front says), by a number of sessions of an owner (which the front says), and by bytes
over all; the longest idle go first, in the last case those of the owner who holds the most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from router.dispatch.rounds import (
    BeginRound,
    Begun,
    CancelRound,
    EndRound,
    Evicted,
    HoldRound,
    RoundBegun,
    RoundCancelled,
    SessionCounts,
    StopRound,
)
from router.qos.least_first import LeastFirst

MAX_BYTES = 256 << 20
MAX_HISTORY_BYTES = 16 << 20
ENTRY_BYTES = 512  # of a session, besides its history
PATIENCE_SECONDS = 0.2  # an end may come a little after the next beginning, which took another way

Told = list[tuple[str, RoundBegun | RoundCancelled | StopRound]]  # (client, message)
log = logging.getLogger("echelon.dispatcher")


@dataclass(slots=True)
class _Session:
    revision: int = 0
    history: bytes = b""
    until: float = inf  # unless a round runs
    client: str | None = None  # whose round runs
    number: int = 0  # of that round
    gone_at: float | None = None  # since when that client is away
    cancels: list[tuple[str, int]] = field(default_factory=list)  # (client, number)
    begins: list[tuple[str, BeginRound, float]] = field(default_factory=list)  # until when they wait

    @property
    def bytes(self) -> int:
        return ENTRY_BYTES + len(self.history)


class KeptHistories:
    """`clock` gives monotonic seconds. A round whose front is away for `grace` seconds is given up.

    A round that is wanted while another one runs waits `patience` seconds before it is told so.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        grace: float,
        *,
        patience: float = PATIENCE_SECONDS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._clock, self._grace, self._patience, self._max_bytes = clock, grace, patience, max_bytes
        self._owners: dict[str, dict[int, _Session]] = {}  # sessions: the longest idle first
        self._bytes: dict[str, int] = {}  # by owner
        self._busy: dict[tuple[str, int], _Session] = {}  # those with a round
        self._ends: LeastFirst[tuple[str, int]] = LeastFirst()  # by `until`: all others, and some of those
        self._largest: LeastFirst[str] = LeastFirst()  # owners by bytes, the most first
        self._evicted = dict.fromkeys(Evicted, 0)
        self._held = 0  # sessions that have a history
        self.bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._owners.values()))

    @property
    def running(self) -> int:
        """Rounds that run."""
        return len(self._busy)

    @property
    def counts(self) -> SessionCounts:
        """For metrics."""
        evicted = tuple((str(reason), count) for reason, count in self._evicted.items())
        return SessionCounts(self._held, len(self._busy), self.bytes, evicted)

    def begin(self, client: str, asked: BeginRound) -> Told:
        """The verdict; if another round runs, it may come out of a later call."""
        session = self._session(asked.owner, asked.session)
        if session is not None and session.client is not None:
            if self._patience <= 0.0:
                return [(client, _verdict(asked, Begun.RUNNING))]
            session.begins.append((client, asked, self._clock() + self._patience))
            return []
        if asked.forget:
            return [(client, self._forget(asked, session))]
        if session is None:
            if not self._make_room(asked.owner, asked.most - 1):
                return [(client, _verdict(asked, Begun.FULL))]
            session = self._add(asked.owner, asked.session)
        session.client, session.number, session.gone_at = client, asked.number, None
        self._busy[asked.owner, asked.session] = session
        return [(client, _verdict(asked, Begun.BEGUN, session))]

    def end(self, client: str, done: EndRound) -> Told:
        """The round is over; of one that was given up meanwhile nothing is kept."""
        session = self._session(done.owner, done.session)
        if session is None or session.client != client or session.revision != done.revision:
            return []
        if done.history:
            self._write(done.owner, done.session, session, done.history, done.revision + 1)
        return self._free(done.owner, done.session, session, done.ttl if done.history else None)

    def hold(self, client: str, known: HoldRound) -> Told:
        """`client` came back, or we did: the newer of both histories counts."""
        session = self._session(known.owner, known.session)
        if session is None:
            if not (known.revision or known.number):
                return []  # it was forgotten before it was ever known
            session = self._add(known.owner, known.session)
        if session.revision < known.revision:
            self._write(known.owner, known.session, session, known.history, known.revision)
            self._keep(known.owner, known.session, session, known.ttl)
        if session.client == client and session.number != known.number:
            return self._free(known.owner, known.session, session, known.ttl)
        if known.number and session.client in (None, client) and session.revision == known.revision:
            session.client, session.number, session.gone_at = client, known.number, None
            self._busy[known.owner, known.session] = session
        self._shrink()
        return []

    def cancel(self, client: str, asked: CancelRound) -> Told:
        """The running round's front is told; the answer comes when the round is over."""
        session = self._session(asked.owner, asked.session)
        if session is None or session.client is None:
            return [(client, RoundCancelled(asked.number, ran=False))]
        session.cancels.append((client, asked.number))
        return [(session.client, StopRound(asked.owner, asked.session, session.number))]

    def client_gone(self, client: str) -> None:
        """It is away: it waits for nothing any more, and may come back and hold what runs there."""
        now = self._clock()
        for session in self._busy.values():
            session.cancels = [c for c in session.cancels if c[0] != client]
            session.begins = [b for b in session.begins if b[0] != client]
            if session.client == client:
                session.gone_at = now

    def tick(self) -> Told:
        """What follows from time alone."""
        now = self._clock()
        for owner, number in self._ends.take(now):
            if (owner, number) not in self._busy:  # else it is kept on when the round is over
                self._remove(owner, number, Evicted.EXPIRED)
        told: Told = []
        for (owner, number), session in list(self._busy.items()):
            late = [b for b in session.begins if b[2] <= now]
            session.begins = [b for b in session.begins if b[2] > now]
            told += [(client, _verdict(asked, Begun.RUNNING)) for client, asked, _ in late]
            if session.gone_at is not None and now - session.gone_at >= self._grace:
                log.warning("session %d of %s: its front is gone, its round is dropped", number, owner)
                told += self._free(owner, number, session, None)
        return told

    # inside

    def _session(self, owner: str, number: int) -> _Session | None:
        session = self._owners.get(owner, {}).get(number)
        if session is not None and session.client is None and session.until <= self._clock():
            self._remove(owner, number, Evicted.EXPIRED)
            return None
        return session

    def _add(self, owner: str, number: int) -> _Session:
        session = self._owners.setdefault(owner, {})[number] = _Session()
        self._count(owner, session.bytes)
        return session

    def _remove(self, owner: str, number: int, why: Evicted | None = None) -> None:
        session = self._owners[owner].pop(number)
        self._ends.drop((owner, number))
        self._count(owner, -session.bytes)
        if session.history:
            self._held -= 1
            if why is not None:
                self._evicted[why] += 1
        if not self._owners[owner]:
            del self._owners[owner], self._bytes[owner]
            self._largest.drop(owner)

    def _count(self, owner: str, change: int) -> None:
        self.bytes += change
        held = self._bytes[owner] = self._bytes.get(owner, 0) + change
        self._largest.put(owner, -held)

    def _write(self, owner: str, number: int, session: _Session, history: bytes, revision: int) -> None:
        if len(history) > MAX_HISTORY_BYTES:
            log.warning("session %d of %s: a history of %d bytes is not kept", number, owner, len(history))
            history = b""
            self._evicted[Evicted.SIZE] += 1
        self._count(owner, len(history) - len(session.history))
        self._held += bool(history) - bool(session.history)
        session.history, session.revision = history, revision

    def _forget(self, asked: BeginRound, session: _Session | None) -> RoundBegun:
        if session is not None:  # what is left of it says so to fronts that remember it
            self._write(asked.owner, asked.session, session, b"", session.revision + 1)
            self._keep(asked.owner, asked.session, session, asked.ttl)
        return _verdict(asked, Begun.FORGOTTEN, session)

    def _keep(self, owner: str, number: int, session: _Session, ttl: float) -> None:
        session.until = self._clock() + ttl
        self._ends.put((owner, number), session.until)

    def _free(self, owner: str, number: int, session: _Session, ttl: float | None) -> Told:
        """No round runs there any more; `ttl` None: it is as it was before."""
        told: Told = [(client, RoundCancelled(n, ran=True)) for client, n in session.cancels]
        begins, session.begins, session.cancels = session.begins, [], []
        session.client = session.gone_at = None
        del self._busy[owner, number]
        if not session.revision:
            self._remove(owner, number)  # its first round came to nothing
        elif ttl is None:
            self._ends.put((owner, number), session.until)
        else:
            self._keep(owner, number, session, ttl)
            sessions = self._owners[owner]
            sessions[number] = sessions.pop(number)  # it was used last
        self._shrink()
        for client, asked, _ in begins:
            told += self.begin(client, asked)
        return told

    def _make_room(self, owner: str, most: int) -> bool:
        """Whether `owner` has at most `most` sessions; the longest idle ones have gone."""
        sessions = self._owners.get(owner, {})
        for number in [n for n, s in sessions.items() if s.client is None][: max(0, len(sessions) - most)]:
            self._remove(owner, number, Evicted.COUNT)
        return len(sessions) <= most

    def _shrink(self) -> None:
        passed: list[str] = []  # owners whose rounds all run
        while self.bytes > self._max_bytes and (owner := self._largest.first()) is not None:
            idle = next((n for n, s in self._owners[owner].items() if s.client is None), None)
            if idle is None:
                passed.append(owner)
                self._largest.drop(owner)
            else:
                self._remove(owner, idle, Evicted.MEMORY)
        for owner in passed:
            self._largest.put(owner, -self._bytes[owner])


def _verdict(asked: BeginRound, verdict: Begun, session: _Session | None = None) -> RoundBegun:
    known = session or _Session()
    return RoundBegun(asked.number, asked.owner, asked.session, verdict, known.revision, known.history)
