"""The order of one engine step: whose turn it is next, and how much of it.

The engine serves one turn after the other until the step is full or `next` returns None, and tells what each turn came
to. Which sequences, blocks and tokens that means is its own matter; nothing here knows them.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import inf

from router.qos.policy import Band, Policy
from router.qos.standing import Standing, TimeHeap
from workers.api.ordering import Turn

_Place = tuple[float, int, Standing]  # (virtual time, number among equals, standing)


@dataclass(frozen=True, slots=True)
class Oldest:
    """The oldest request, waiting or running, of a tier: whose it is, and since when (seconds) it is there."""

    standing: Standing
    since: float
    request: Hashable


class Turns:
    """One step's turns: overdue requests, tiers below their floor, then bands and in each the least virtual time.

    What the step will charge counts as it is planned, as `pending` of the standings, until `Policy.commit` settles it.
    `oldest` names the oldest request of each tier that has a `max_wait`. `base`: seconds of a step that runs nothing.
    Not `bounded`: lower tiers may add to the highest one's steps what they want.
    """

    def __init__(
        self,
        policy: Policy,
        now: float,
        oldest: Mapping[str, Oldest] | None = None,
        *,
        base: float = 0.0,
        bounded: bool = True,
    ) -> None:
        self._policy, self._limits = policy, policy.limits
        active = [number for number, band in policy.bands.items() if band.active]
        self._top = active[0] // 2 if active else 0
        self._last_of_top = 2 * self._top + 1
        self._bounded, self._own, self._added = bounded, base, 0.0  # seconds: of the highest tier, of those below it
        self._references: dict[int, float] = {}  # by band: the least of those that were served and have admissible work
        self._turn: Turn | None = None
        self.provisional: dict[Standing, float] = {}
        self.admitting = True
        tiers = policy.config.tiers
        firsts = [(t, (oldest or {}).get(t.name)) for t in tiers if t.max_wait is not None]
        self._overdue = [f for t, f in firsts if f is not None and now - f.since >= (t.max_wait or inf)]
        owed = {t: policy.floors.owed(t.name) for t in tiers}
        self._owed = {t.name: units for t, units in owed.items() if units > 0.0}
        floors = [n for n in active if policy.bands[n].tier in self._owed and n // 2 != self._top]
        self._walks = [_Walk(policy, floors, urgent=True)] if floors else []
        self._walks.append(_Walk(policy, active, urgent=False))

    def next(self) -> Turn | None:
        """The next turn, to be answered by `served`; None: nobody is left, and the turns are closed."""
        self._turn = self._find()
        return self._turn

    def served(self, units: float, *, more: bool, admissible: bool = False, seconds: float = 0.0) -> None:
        """See `workers.api.ordering.Turns`."""
        turn, self._turn = self._turn, None
        assert turn is not None, "no turn is open"
        standing: Standing = turn.flow
        if units:
            if admissible:
                reference = self._references.get(standing.band, inf)
                self._references[standing.band] = min(reference, self._before(standing))
            standing.pending += units
            provisional = self.provisional
            provisional[standing] = provisional.get(standing, 0.0) + units
        if standing.band > self._last_of_top:
            self._added += seconds
        else:
            self._own += seconds
        if turn.urgent and turn.only is None:
            self._owed[standing.account.tier.name] -= units
        if more and units and turn.only is None:
            self._walks[0].again(standing)

    def close(self) -> dict[Standing, float]:
        """No more turns; returns what they will probably charge, for `Policy.commit`."""
        for walk in self._walks:
            walk.close()
        self._walks = []
        return self.provisional

    def _find(self) -> Turn | None:
        if self._overdue:
            first = self._overdue.pop(0)
            return Turn(first.standing, self._limits.quantum, only=first.request, urgent=True)
        while self._walks:
            walk = self._walks[0]
            found = walk.next(admitting=self.admitting or walk.urgent)
            if found is None:
                walk.close()
                self._walks.pop(0)
            elif walk.urgent:
                owed = self._owed[found.account.tier.name]
                if owed > 0.0:
                    return Turn(found, min(owed, self._limits.quantum), urgent=True)
            elif not self._references or not self._paced(found):
                if found.band <= self._last_of_top:
                    if found.turn is None:
                        found.turn = Turn(found, self._limits.quantum)
                    return found.turn
                left = self._left()
                if left > 0.0:
                    return Turn(found, self._limits.quantum, left)
                self.close()
        return None

    def _left(self) -> float:
        """Seconds that tiers below the highest one may add, now that it has had its turns."""
        if not self._bounded:
            return inf
        policy = self._policy
        return min(policy.tau, policy.config.tiers[self._top].spare(self._own)) - self._added

    def _paced(self, standing: Standing) -> bool:
        """Whether it is too far ahead of somebody who was served and still has admissible work waiting."""
        reference = self._references.get(standing.band)
        if reference is None:
            return False
        return (self._before(standing) - reference) * standing.weight > self._limits.ahead

    def _before(self, standing: Standing) -> float:
        """Its virtual time before its first turn."""
        pending = standing.pending - self.provisional.get(standing, 0.0)
        return (standing.service + pending) / standing.weight + standing.offset


class _Walk:
    """The active accounts of some bands, the least first; those that are told `again` come again, at their new time.

    Those with residents are few (there are only so many slots) and sorted; of those that only wait, the heap says who
    is least.
    """

    def __init__(self, policy: Policy, bands: list[int], *, urgent: bool) -> None:
        self.urgent = urgent
        self._policy, self._bands = policy, bands
        self._residents: list[Standing] | None = None  # of the first band, the greatest first
        self._seen: set[Standing] = set()
        self._dropped: list[Standing] = []  # taken out of their heap
        self._again: list[_Place] = []
        self._count = 0

    def again(self, standing: Standing) -> None:
        self._count += 1
        heapq.heappush(self._again, (standing.time, self._count, standing))

    def next(self, *, admitting: bool) -> Standing | None:
        while self._bands:
            residents = self._residents
            if residents is None:
                residents = self._residents = _sorted_residents(self._policy.bands[self._bands[0]])
            while residents and residents[-1] in self._seen:
                residents.pop()
            best = residents[-1] if residents else None
            if admitting or self._again:
                least = inf if best is None else best.time
                top = self._first_waiting(self._policy.bands[self._bands[0]]) if admitting else None
                if top is not None and top[0] < least:
                    least, best = top[0], top[2]
                if self._again and self._again[0][0] < least:
                    return heapq.heappop(self._again)[2]
            if best is not None:
                self._seen.add(best)
                return best
            self._bands, self._residents = self._bands[1:], None
        return None

    def _first_waiting(self, band: Band) -> _Place | None:
        while (top := band.waiting.top()) is not None and top[2] in self._seen:
            TimeHeap.drop(top[2])
            self._dropped.append(top[2])
        return top

    def close(self) -> None:
        for standing in self._dropped:
            self._policy.place(standing)
        self._dropped = []


def _sorted_residents(band: Band) -> list[Standing]:
    """Who has residents, the greatest time first, of equals the one that came last."""
    standings = [*band.both, *band.running]
    standings.sort(key=_time)
    standings.reverse()
    return standings


def _time(standing: Standing) -> float:
    """See `Standing.time`."""
    return (standing.service + standing.pending) / standing.weight + standing.offset
