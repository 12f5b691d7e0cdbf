"""The waiting room of requests without a lease, and its simplest kind: a bounded heap in the order of an `Ordering`."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from router.qos.members import Line, Place, rank
from router.qos.outlook import Errors, Outlook
from router.qos.watch import Reading

Name = TypeVar("Name")
Key = tuple[int, float, float]  # (tier rank, virtual time, arrival in seconds); the least goes first
Item = TypeVar("Item")
Ordered_contra = TypeVar("Ordered_contra", contravariant=True)


def counted(counts: dict[Name, int], name: Name, change: int) -> None:
    """`counts` of `name` changes; what comes to 0 is not in it."""
    left = counts.get(name, 0) + change
    if left:
        counts[name] = left
    else:
        counts.pop(name, None)


@dataclass(frozen=True, slots=True)
class TierState:
    """What waits in one tier, the oldest of it since `oldest_seconds`; `outlook` is that of one more request."""

    tier: str
    waiting: int
    oldest_seconds: float
    outlook: Outlook
    reading: Reading


class Arrived(Protocol):
    """What has waited since `arrived` (monotonic seconds)."""

    arrived: float


class Ordering(Protocol[Ordered_contra]):
    """Ranks what waits."""

    def key(self, item: Ordered_contra) -> Key:
        """The place of `item`; taken once, when it is queued."""


class Fifo:
    """First come, first served, whoever it is."""

    def key(self, item: Arrived) -> Key:
        """Arrival alone counts."""
        return (0, 0.0, item.arrived)


class Seat(NamedTuple):
    """Where an item is charged: the rank of its tier (the least is the highest), and its account."""

    rank: int
    account: tuple[str, ...]


class Room(Protocol[Item]):
    """Where requests wait for a lease; it decides who comes next, and hears how each lease ended."""

    def __len__(self) -> int: ...
    def __contains__(self, item_id: str) -> bool: ...
    def __iter__(self) -> Iterator[Item]: ...

    def refusal(self, item: Item) -> str | None:
        """Why `item` must not wait here, in words; None if it may."""

    def shed(self, item: Item) -> Item | None:
        """What leaves, and is out already, so that `item` may wait; None: nobody has to."""

    def ahead(self, item: Item) -> int:
        """About how many requests would go before `item`, if it waited."""

    def prospect(self, item: Item, seconds: float) -> Outlook:
        """Where `item` would stand, and how long it would wait; `seconds` pass between two releases, if not known."""

    def outlook(self, item_id: str, seconds: float) -> Outlook:
        """The same for what waits. Raises KeyError."""

    def tiers(self) -> list[TierState]:
        """All tiers in which anybody waits, or has; none where there are no tiers."""

    def seat(self, item: Item) -> Seat:
        """Where it is charged."""

    def fronts(self, most: int) -> list[Item]:
        """Of each account that waits what comes first, of the first `most` accounts."""

    @property
    def waiting_by_user(self) -> Mapping[tuple[str, str], int]:
        """How many wait, by tier and user; it changes as they come and go."""

    def waiting_of(self, user: str) -> int:
        """How many of `user` wait."""

    def push(self, item_id: str, item: Item) -> None:
        """Queue `item`; its id must not be queued already (ValueError)."""

    def peek(self) -> Item | None:
        """Who comes next, or None."""

    def remove(self, item_id: str) -> Item | None:
        """Take `item_id` out for good; None if it does not wait."""

    def since(self, item_id: str) -> float | None:
        """When the place was taken at which `item_id`, which waits, would be released now; None: when it came."""

    def granted(self, item_id: str) -> None:
        """`item_id`, which waits, leaves for a lease."""

    def adopt(self, item_id: str, item: Item) -> None:
        """`item` holds a lease already."""

    def ended(
        self, item_id: str, prefill: int = 0, decode: int = 0, kv_read: int = 0, *, charged: bool = False
    ) -> None:
        """The lease is over, and so many tokens were executed, or read by decodes; `charged`: step by step, as its
        replica reported them. Unknown ids are left alone.
        """

    def set_aside(self, item_id: str) -> None:
        """`item_id`, which waits, is passed over until `put_back`."""

    def put_back(self) -> None:
        """All that was set aside waits again, as if nothing had happened."""


class WaitingQueue(Generic[Item]):
    """Items by id, least key first, equal keys in the order in which they were queued. `user` tells an item's tier and
    user.

    `line` says whose an item is, and its place among his: where he asks for an order of his own, his items share out
    the places that they have here, so that nobody else waits for more or for less. Removal leaves a dead entry in the
    heap, skipped later: all operations are O(log n) amortized.
    """

    def __init__(
        self,
        ordering: Ordering[Item],
        limit: int,
        line: Callable[[Item], tuple[Hashable, Place]] = lambda item: (None, Place(True, 0, 0.0)),
        user: Callable[[Item], tuple[str, str]] = lambda item: ("", ""),
    ) -> None:
        self._ordering, self._user = ordering, user
        self._by_user: dict[tuple[str, str], int] = {}
        self._of_user: dict[str, int] = {}
        self._limit = limit
        self._line = line
        self._lines: dict[Hashable, Line] | None = None  # while anybody asks for an order of his own
        self._heap: list[tuple[Key, int, str]] = []
        self._live: dict[str, tuple[int, Key, Item]] = {}
        self._aside: dict[str, Item] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._live

    def __iter__(self) -> Iterator[Item]:
        """All items, in the order they were queued (not in rank order)."""
        return (item for _, _, item in self._live.values())

    @property
    def full(self) -> bool:
        """Whether the bound is reached. `push` does not look: accepted work may go over it."""
        return len(self._live) >= self._limit

    def refusal(self, item: Item) -> str | None:
        """The bound is all that counts."""
        return f"{len(self._live)} requests wait already" if self.full else None

    def shed(self, item: Item) -> Item | None:
        """Nobody leaves for another."""
        return None

    def ahead(self, item: Item) -> int:
        """All that wait."""
        return len(self._live)

    def prospect(self, item: Item, seconds: float) -> Outlook:
        """Behind all that wait."""
        return Errors().outlook(len(self._live) + 1, (len(self._live) + 1) * seconds)

    def outlook(self, item_id: str, seconds: float) -> Outlook:
        """By what has a lesser place."""
        line = self._line_of(item_id)
        places = sorted((self._live[i][1], self._live[i][0]) for i in ((item_id,) if line is None else line.live))
        mine = places[0 if line is None else line.ahead(item_id)]
        position = 1 + sum((key, n) < mine for n, key, _ in self._live.values())
        return Errors().outlook(position, position * seconds)

    def tiers(self) -> list[TierState]:
        """There are none."""
        return []

    def seat(self, item: Item) -> Seat:
        """All alike."""
        return Seat(0, ())

    def fronts(self, most: int) -> list[Item]:
        """None: there are no accounts."""
        return []

    @property
    def waiting_by_user(self) -> Mapping[tuple[str, str], int]:
        """See `Room`."""
        return self._by_user

    def waiting_of(self, user: str) -> int:
        """See `Room`."""
        return self._of_user.get(user, 0)

    def push(self, item_id: str, item: Item) -> None:
        """Queue `item`; its id must not be queued already (ValueError)."""
        if item_id in self._live:
            raise ValueError(f"{item_id} waits already")
        self._count += 1
        key = self._ordering.key(item)
        self._live[item_id] = (self._count, key, item)
        self._count_user(item, 1)
        heapq.heappush(self._heap, (key, self._count, item_id))
        name, place = self._line(item)
        if self._lines is not None:
            self._enter(item_id, name, place)
        elif place.priority:
            self._lines = {}
            for known, (_, _, waiting) in self._live.items():
                self._enter(known, *self._line(waiting))

    def remove(self, item_id: str) -> Item | None:
        """Take `item_id` out, wherever it stands; None if it does not wait."""
        found = self._live.pop(item_id, None)
        if found is not None:
            self._count_user(found[2], -1)
            if self._lines is not None:
                self._leave(item_id, found[2])
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
        return found[2] if found else None

    def peek(self) -> Item | None:
        """The first item, or None."""
        item_id = self._top()
        if item_id is None:
            return None
        line = self._line_of(item_id)
        return self._live[item_id if line is None else line.first()][2]

    def since(self, item_id: str) -> float | None:
        """Nobody asks how long it took."""

    def granted(self, item_id: str) -> None:
        """It waits no more; if another one of its owner's stood before it, that one gets its place."""
        line, top = self._line_of(item_id), self._top()
        if line is not None and top is not None and top != item_id and top in line.live:
            number, key, _ = self._live[item_id]
            self._live[top] = (number, key, self._live[top][2])
            heapq.heappush(self._heap, (key, number, top))
        self.remove(item_id)

    def adopt(self, item_id: str, item: Item) -> None:
        """Leases change nothing here."""

    def ended(
        self, item_id: str, prefill: int = 0, decode: int = 0, kv_read: int = 0, *, charged: bool = False
    ) -> None:
        """Leases change nothing here."""

    def set_aside(self, item_id: str) -> None:
        """It is passed over until `put_back`."""
        item = self.remove(item_id)
        if item is not None:
            self._aside[item_id] = item

    def put_back(self) -> None:
        """All that was set aside waits again."""
        for item_id, item in self._aside.items():
            self.push(item_id, item)
        self._aside.clear()

    def _top(self) -> str | None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def _line_of(self, item_id: str) -> Line | None:
        """The items of its owner, where they have an order of their own."""
        if self._lines is None:
            return None
        line = self._lines[self._line(self._live[item_id][2])[0]]
        return line if line.mixed else None

    def _enter(self, item_id: str, name: Hashable, place: Place) -> None:
        assert self._lines is not None, "nobody asks for an order of his own"
        self._lines.setdefault(name, Line()).push("", item_id, place, rank(place, self._live[item_id][0]))

    def _leave(self, item_id: str, item: Item) -> None:
        assert self._lines is not None, "nobody asks for an order of his own"
        name = self._line(item)[0]
        line = self._lines[name]
        line.remove(item_id, 0.0)
        if not line:
            del self._lines[name]
        if not self._live:
            self._lines = None

    def _count_user(self, item: Item, change: int) -> None:
        key = self._user(item)
        counted(self._by_user, key, change)
        counted(self._of_user, key[1], change)

    def _is_live(self, entry: tuple[Key, int, str]) -> bool:
        found = self._live.get(entry[2])
        return found is not None and found[0] == entry[1]
