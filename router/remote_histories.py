"""`router.http.rounds.Histories` at the dispatcher: a session goes on whichever front its next round reaches.

A front remembers what it last knew of the sessions whose rounds it ran, and tells it to a dispatcher that was
restarted: the newest of what is told counts. `LocalLine` is a dispatcher's part of this for a process of its own.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, Protocol

from router.dispatch.histories import ENTRY_BYTES, KeptHistories, Told
from router.dispatch.rounds import (
    BeginRound,
    Begun,
    CancelRound,
    EndRound,
    HoldRound,
    RoundBegun,
    StopRound,
)
from router.protocol.errors import HttpRefusal
from workers.api.errors import NoReplica, Overloaded

PATIENCE_SECONDS = 5.0  # without a dispatcher
MAX_REMEMBERED_BYTES = 16 << 20  # of histories that are told to a restarted dispatcher
_AGAIN_SECONDS = 0.05

Key = tuple[str, int]  # owner, session


class Line(Protocol):
    """The part of `DispatcherClient` that is used here."""

    on_opened: list[Callable[[], None]]
    on_stop: list[Callable[[StopRound], None]]

    @property
    def connected(self) -> bool:
        """Whether there is a dispatcher."""

    def tell(self, message: Any) -> None:
        """Send what asks for no answer."""

    async def ask(self, question: Callable[[int], Any]) -> Any:
        """The answer to `question(number)`. Raises ConnectionError."""


@dataclass(frozen=True, slots=True)
class _Known:
    revision: int
    history: bytes
    until: float

    @property
    def bytes(self) -> int:
        return ENTRY_BYTES + len(self.history)


@dataclass(frozen=True, slots=True)
class _Running:
    number: int
    revision: int
    history: bytes
    on_stop: Callable[[], None]


class RemoteHistories:
    """Rounds over `line`. An owner has at most `max_sessions`, each kept `ttl` seconds after its last round."""

    def __init__(self, line: Line, *, ttl: float, max_sessions: int, patience: float = PATIENCE_SECONDS) -> None:
        self._line, self._ttl, self._most, self._patience = line, ttl, max_sessions, patience
        self._running: dict[Key, _Running] = {}
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._known_bytes = 0
        self._early: deque[int] = deque(maxlen=1000)  # numbers of rounds that are to end, and may not have begun here
        line.on_opened.append(self._tell_all)
        line.on_stop.append(self._stop)

    async def begin(self, owner: str, session: int, on_stop: Callable[[], None]) -> bytes:
        """See `Histories`."""
        begun = await self._begin(owner, session, forget=False)
        self._running[owner, session] = _Running(begun.number, begun.revision, begun.history, on_stop)
        if begun.number in self._early:
            on_stop()
        return begun.history

    def end(self, owner: str, session: int, history: bytes) -> None:
        """See `Histories`. Without a dispatcher, the next one hears of it."""
        running = self._running.pop((owner, session))
        if history:
            self._remember((owner, session), _Known(running.revision + 1, history, monotonic() + self._ttl))
        self._line.tell(EndRound(owner, session, running.revision, history, self._ttl))

    async def forget(self, owner: str, session: int) -> None:
        """See `Histories`."""
        begun = await self._begin(owner, session, forget=True)
        self._remember((owner, session), _Known(begun.revision, b"", monotonic() + self._ttl))

    async def cancel(self, owner: str, session: int) -> None:
        """See `Histories`."""
        await self._ask(lambda number: CancelRound(number, owner, session))

    async def _begin(self, owner: str, session: int, *, forget: bool) -> RoundBegun:
        answer = await self._ask(lambda number: BeginRound(number, owner, session, self._most, self._ttl, forget))
        assert isinstance(answer, RoundBegun)
        match answer.verdict:
            case Begun.RUNNING:
                raise HttpRefusal(
                    409,
                    f"Another round of session {session} is running: wait for its end, or end it with 'cancel'.",
                    code="session_in_use",
                )
            case Begun.FULL:
                raise Overloaded(f"all of your {self._most} sessions are running", retry_after=1.0)
        return answer

    async def _ask(self, question: Callable[[int], Any]) -> Any:
        since = monotonic()
        while True:
            try:
                return await self._line.ask(question)
            except ConnectionError as e:
                if self._line.connected:
                    since = monotonic()
                if monotonic() - since > self._patience:
                    raise NoReplica(f"sessions cannot be looked up: {e}", retry_after=2.0) from e
                await asyncio.sleep(_AGAIN_SECONDS)

    def _stop(self, message: StopRound) -> None:
        running = self._running.get((message.owner, message.session))
        if running is None:
            self._early.append(message.number)
        elif running.number == message.number:
            running.on_stop()

    def _remember(self, key: Key, known: _Known) -> None:
        before = self._known.pop(key, None)
        self._known_bytes += known.bytes - (before.bytes if before is not None else 0)
        self._known[key] = known
        while self._known_bytes > MAX_REMEMBERED_BYTES:
            self._known_bytes -= self._known.popitem(last=False)[1].bytes

    def _tell_all(self) -> None:
        now = monotonic()
        for (owner, session), known in self._known.items():
            if known.until > now and (owner, session) not in self._running:
                hold = HoldRound(owner, session, known.revision, known.history, known.until - now, 0)
                self._line.tell(hold)
        for (owner, session), running in self._running.items():
            revision, history = running.revision, running.history
            self._line.tell(HoldRound(owner, session, revision, history, self._ttl, running.number))


class LocalLine:
    """Sessions of one process, which no dispatcher knows."""

    connected = True

    def __init__(self) -> None:
        self.on_opened: list[Callable[[], None]] = []
        self.on_stop: list[Callable[[StopRound], None]] = []
        self.histories = KeptHistories(monotonic, grace=0.0, patience=0.0)
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}

    def tell(self, message: Any) -> None:
        """See `Line`."""
        assert isinstance(message, EndRound)
        self._hand_out(self.histories.end("", message))

    async def ask(self, question: Callable[[int], Any]) -> Any:
        """See `Line`."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        message = question(number)
        self._hand_out(self.histories.tick())
        if isinstance(message, BeginRound):
            self._hand_out(self.histories.begin("", message))
        else:
            self._hand_out(self.histories.cancel("", message))
        try:
            return await answer
        finally:
            del self._asked[number]

    def _hand_out(self, told: Told) -> None:
        for _, message in told:
            if isinstance(message, StopRound):
                for hook in self.on_stop:
                    hook(message)
            elif message.number in self._asked and not self._asked[message.number].done():
                self._asked[message.number].set_result(message)
