"""The waiting requests of one account: its users in turn, and the sub-users of each in turn.

An account has several users where a `default` line stands for all without a line of their own; they share its turn. A
user has several sub-users where its requests name some: they share the user's turn, and nobody gains by naming many.
Whoever was served least goes first, each one's requests by priority and arrival; who returns from idle has no claim on
what was missed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

MOST_USERS = 10_000  # known at once in one account
MOST_SUBS = 256  # known at once of one user; later ones share a turn
_OTHERS = "\0others"
_REPLAYS = "\0replays"
_ROOM = 64
_NUMBER_BITS = 48


class Place(NamedTuple):
    """Of one user's requests the accepted ones (replays) go first, then the least priority, then who came first."""

    late: bool  # not accepted
    priority: int
    arrived: float


def rank(place: Place, number: int) -> int:
    """Grows with priority, and with `number`, which grows from request to request, among equals."""
    return number + (place.priority << _NUMBER_BITS) if place.priority else number


class Line:
    """Requests by place. `mixed`: some of them have a priority, so that they need not go as they came."""

    __slots__ = ("_heap", "live", "mixed")

    def __init__(self) -> None:
        self._heap: list[tuple[Place, int, str]] = []  # dead entries are skipped
        self.live: dict[str, int] = {}  # their ranks
        self.mixed = False

    def __len__(self) -> int:
        return len(self.live)

    def push(self, sub: str, item_id: str, place: Place, number: int) -> None:
        """One more, whose rank is `number`."""
        if place.priority:
            self.mixed = True
        self.live[item_id] = number
        heapq.heappush(self._heap, (place, number, item_id))

    def remove(self, item_id: str, units: float) -> None:
        """It waits no more."""
        del self.live[item_id]
        if not self.live:
            self.mixed = False
        if len(self._heap) > 2 * len(self.live) + 64:
            self._heap = [e for e in self._heap if self.live.get(e[2]) == e[1]]
            heapq.heapify(self._heap)

    def first(self) -> str:
        """Which goes first. Raises IndexError if none waits."""
        while self.live.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def ahead(self, item_id: str) -> int:
        """How many go before it, replays aside."""
        mine = self.live[item_id]
        return sum(1 for number in self.live.values() if number < mine)

    def entries(self) -> list[tuple[Place, int, str]]:
        """Those that live."""
        return [e for e in self._heap if self.live.get(e[2]) == e[1]]


@dataclass(slots=True, eq=False)
class _Member:
    line: Line | _Subs
    time: float = 0.0
    entry: int = -1  # of its one valid entry in the order


class _Turns:
    """Start-time fair queueing (Goyal et al., SIGCOMM'96) over members of equal weight; `most` are known by name."""

    __slots__ = ("_active", "_clock", "_count", "_home", "_idled", "_members", "_most", "_order")

    def __init__(self, most: int) -> None:
        self._members: dict[str, _Member] = {}
        self._home: dict[str, _Member] = {}  # by request
        self._order: list[tuple[float, int, _Member]] = []
        self._clock = 0.0  # the time at which the last release started
        self._count = self._active = 0
        self._most = most
        self._idled = 0  # how often a member has, since the idle were forgotten

    def __len__(self) -> int:
        return len(self._home)

    def _member(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            if len(self._members) >= self._most and name != _OTHERS:
                return self._member(_OTHERS)
            member = self._members[name] = _Member(Line(), float("-inf") if name == _REPLAYS else 0.0)
        return member

    def _enter(self, member: _Member) -> None:
        """It had nothing that waits, and will."""
        self._active += 1
        if member is not self._members.get(_REPLAYS):
            member.time = max(member.time, self._clock)
        self._stand(member)

    def remove(self, item_id: str, units: float) -> None:
        member = self._home.pop(item_id)
        member.line.remove(item_id, units)
        if units:
            self._clock = max(self._clock, member.time)
            member.time += units
        if member.line:
            if units:
                self._stand(member)
        else:
            self._active -= 1
            member.entry = -1
            self._idled += 1
            if self._idled >= max(_ROOM, len(self._members)):
                self._forget()

    def first(self) -> str:
        while self._order[0][1] != self._order[0][2].entry:
            heapq.heappop(self._order)
        return self._order[0][2].line.first()

    def line_of(self, item_id: str) -> Line:
        line = self._home[item_id].line
        return line if isinstance(line, Line) else line.line_of(item_id)

    def ahead(self, item_id: str) -> int:
        member = self._home[item_id]
        earlier = member.line.ahead(item_id)
        return earlier + sum(min(len(m.line), earlier + 1) for m in self._members.values() if m is not member)

    def _forget(self) -> None:
        """Idle members go, but those who had more than their turn; when nobody waits, nobody is owed anything."""
        if not self._active:
            self._clock = max(self._clock, *(m.time for m in self._members.values()))
        self._members = {u: m for u, m in self._members.items() if m.line or m.time > self._clock}
        self._idled = 0

    def _stand(self, member: _Member) -> None:
        self._count += 1
        member.entry = self._count
        heapq.heappush(self._order, (member.time, self._count, member))


class _Subs(_Turns):
    """The sub-users of one user."""

    __slots__ = ()

    def push(self, sub: str, item_id: str, place: Place, number: int) -> None:
        member = self._member(sub if place.late else _REPLAYS)
        if not member.line:
            self._enter(member)
        member.line.push("", item_id, place, number)
        self._home[item_id] = member


class Members(_Turns):
    """Request ids of one account."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        super().__init__(MOST_USERS)
        self._numbers = 0

    def push(self, user: str, item_id: str, place: Place, sub: str = "") -> None:
        """One more request of `user` waits, of its sub-user `sub` ("" = of itself)."""
        self._numbers += 1
        number = rank(place, self._numbers)
        member = self._member(user)
        if not member.line:
            self._enter(member)
        if sub and isinstance(member.line, Line):
            # Most users name no sub-users: theirs is one line, until the first one is named.
            before, member.line = member.line, _Subs(MOST_SUBS)
            for known, earlier, waiting in before.entries():
                member.line.push("", waiting, known, earlier)
        member.line.push(sub, item_id, place, number)
        self._home[item_id] = member

    def remove(self, item_id: str, units: float = 0.0) -> None:
        """The request waits no more; `units` > 0: it was released, which counts as its user's turn."""
        super().remove(item_id, units)

    def first(self) -> str:
        """The request whose turn it is. Raises IndexError if none waits."""
        return super().first()

    def line_of(self, item_id: str) -> Line:
        """The requests of the same user, and sub-user, that wait."""
        return super().line_of(item_id)

    def ahead(self, item_id: str) -> int:
        """About how many requests go before this one: its user's that go first, and as many of each other user."""
        return super().ahead(item_id)
