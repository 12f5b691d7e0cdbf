"""The waiting requests of one account, by user: who was released least goes first, each user's by arrival.

An account has several users where a `default` line stands for all without a line of their own. They share its turn; who
returns from idle has no claim on what was missed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

_ROOM = 64

Place = tuple[bool, float]  # (not accepted, arrived): the least of a user's requests goes first


@dataclass(slots=True, eq=False)
class _Member:
    user: str
    time: float = 0.0
    queue: list[tuple[Place, int, str]] = field(default_factory=list)  # a heap; dead entries are skipped
    live: dict[str, int] = field(default_factory=dict)
    entry: int = -1  # of its one valid entry among the members


class Members:
    """Request ids. Start-time fair queueing (Goyal et al., SIGCOMM'96) over users of equal weight."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._order: list[tuple[float, int, _Member]] = []
        self._clock = 0.0  # the time at which the last release started
        self._count = self._active = 0
        self._most = _ROOM  # members; then the idle are forgotten

    def push(self, user: str, item_id: str, place: Place) -> None:
        """One more request of `user` waits."""
        self._count += 1
        member = self._members.get(user)
        if member is None:
            member = self._members[user] = _Member(user)
        if not member.live:
            self._active += 1
            member.time = max(member.time, self._clock)
            self._stand(member)
        member.live[item_id] = self._count
        heapq.heappush(member.queue, (place, self._count, item_id))

    def remove(self, user: str, item_id: str, units: float = 0.0) -> None:
        """The request waits no more; `units` > 0: it was released, which counts as its user's turn."""
        member = self._members[user]
        del member.live[item_id]
        if units:
            self._clock = max(self._clock, member.time)
            member.time += units
        if member.live:
            if units:
                self._stand(member)
        else:
            self._active -= 1
            member.entry = -1
            if len(self._members) >= self._most:
                self._forget()
        if len(member.queue) > 2 * len(member.live) + 64:
            member.queue = [e for e in member.queue if member.live.get(e[2]) == e[1]]
            heapq.heapify(member.queue)

    def first(self) -> str:
        """The request whose turn it is. Raises IndexError if none waits."""
        while self._order[0][1] != self._order[0][2].entry:
            heapq.heappop(self._order)
        queue, live = self._order[0][2].queue, self._order[0][2].live
        while live.get(queue[0][2]) != queue[0][1]:
            heapq.heappop(queue)
        return queue[0][2]

    def ahead(self, user: str, item_id: str) -> int:
        """About how many requests go before this one: its user's that came earlier, and as many of each other user."""
        mine = self._members[user].live
        earlier = sum(1 for number in mine.values() if number < mine[item_id])
        return earlier + sum(min(len(m.live), earlier + 1) for m in self._members.values() if m.live is not mine)

    def _forget(self) -> None:
        """Idle members go, but those who had more than their turn; when nobody waits, nobody is owed anything."""
        if not self._active:
            self._clock = max(m.time for m in self._members.values())
        self._members = {u: m for u, m in self._members.items() if m.live or m.time > self._clock}
        self._most = 2 * len(self._members) + _ROOM

    def _stand(self, member: _Member) -> None:
        self._count += 1
        member.entry = self._count
        heapq.heappush(self._order, (member.time, self._count, member))
