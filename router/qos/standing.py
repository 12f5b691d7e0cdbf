"""Where accounts stand: their service, their virtual time, whether they wait or run; and their order in a band.

A band is a tier's accounts with a quota, or those without: the latter come after the former and before the next tier.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from router.qos.config import Account
from workers.api.ordering import Turn


class Standing:
    """One account in one queue of work.

    `service` is settled, in units, and under its present key; `pending` is what planned or leased work will probably be
    charged. `offset` is what lifts on return from idle added; it is kept apart: `service` stays what was served.
    `turn` is its usual one.
    """

    __slots__ = (
        *("account", "band", "counted", "home", "key", "offset", "pending"),
        *("queued", "resident", "service", "turn", "weight"),
    )

    def __init__(self, account: Account) -> None:
        self.home: TimeHeap | None = None  # where it stands
        self.turn: Turn | None = None
        self.service = self.pending = self.offset = 0.0
        self.queued = self.resident = 0  # requests: that wait, that hold slot and blocks
        self.counted = 0  # of those that wait, how many its band has counted
        self._take(account)

    def assign(self, account: Account) -> None:
        """It is `account` from now on, at the same virtual time. Service counts for each name apart, as in reports."""
        time = self.time
        if account.key != self.key:
            self.service = 0.0
        self._take(account)
        self.offset = time - (self.service + self.pending) / self.weight

    def _take(self, account: Account) -> None:
        self.account, self.key = account, account.key
        self.weight = account.quota or 1.0  # accounts without a quota share what is left equally
        self.band = 2 * account.tier.rank + (account.quota == 0.0)

    @property
    def time(self) -> float:
        """Virtual time: who has least is served first. Grows by units / weight."""
        return (self.service + self.pending) / self.weight + self.offset

    def __repr__(self) -> str:
        return f"Standing({'/'.join(self.account.key)}, time={self.time:.1f}, {self.queued} wait, {self.resident} run)"


class TimeHeap:
    """Standings by virtual time, the least first, equals in the order in which they came.

    A time that has grown is noticed when its entry comes up, so that service costs nothing here; one that has shrunk
    needs another `put`.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._valid: dict[Standing, _Entry] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __iter__(self) -> Iterator[Standing]:
        return iter(self._valid)

    def put(self, standing: Standing) -> None:
        """It stands here and nowhere else, at its present time."""
        if standing.home is not self:
            if standing.home is not None:
                del standing.home._valid[standing]
            standing.home = self
        time = (standing.service + standing.pending) / standing.weight + standing.offset
        entry = self._valid.get(standing)
        if entry is not None and entry[0] <= time:
            return
        self._count += 1
        entry = self._valid[standing] = (time, self._count, standing)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = list(self._valid.values())
            heapq.heapify(self._heap)

    @staticmethod
    def settled(standings: Iterable[Standing]) -> list[Standing]:
        """Their times have changed, and they stand where they stood; returns those that stand nowhere."""
        nowhere = []
        for standing in standings:
            home = standing.home
            if home is None:
                nowhere.append(standing)
            else:
                time = (standing.service + standing.pending) / standing.weight + standing.offset
                if time < home._valid[standing][0]:
                    home.put(standing)
        return nowhere

    @staticmethod
    def drop(standing: Standing) -> None:
        """It stands nowhere."""
        if standing.home is not None:
            del standing.home._valid[standing]
            standing.home = None

    def top(self) -> _Entry | None:
        """The one with least time, and that time before all; None if there is none."""
        heap, valid = self._heap, self._valid
        while heap:
            entry = heap[0]
            standing = entry[2]
            if valid.get(standing) is not entry:
                heapq.heappop(heap)
                continue
            time = (standing.service + standing.pending) / standing.weight + standing.offset
            if time <= entry[0]:
                return entry
            self._count += 1
            grown = valid[standing] = (time, self._count, standing)
            heapq.heapreplace(heap, grown)
        return None

    def least(self, most: int) -> list[Standing]:
        """The first `most`, the least first."""
        taken: list[_Entry] = []
        while len(taken) < most and (top := self.top()) is not None:
            taken.append(heapq.heappop(self._heap))
            assert taken[-1] is top
        for entry in taken:
            heapq.heappush(self._heap, entry)
        return [entry[2] for entry in taken]

    def first(self) -> Standing | None:
        """The one with least time; None if there is none."""
        top = self.top()
        return None if top is None else top[2]


_Entry = tuple[float, int, Standing]  # (virtual time, number, standing)
