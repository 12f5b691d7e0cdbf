"""The order of one engine step: whose turn it is next, and how much of it.

The engine serves one turn after the other until the step is full or `next` returns None, and tells what each turn came
to. Which sequences, blocks and tokens that means is its own matter; nothing here knows them.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from router.qos.policy import Band, Policy
from router.qos.standing import Standing, TimeHeap


class Turn(NamedTuple):
    """Serve `standing`: its decodes, oldest first, then part-done prefills, then its queue; until that will be charged
    `units` or takes `seconds` of predicted time, whichever comes first.

    `oldest`: only the oldest request of its tier, which is overdue. `urgent`: slots and blocks may be taken from any
    account but protected ones (see `Policy.victim`), for the tier is owed service.
    """

    standing: Standing
    units: float
    seconds: float = inf
    oldest: bool = False
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Oldest:
    """The oldest request, waiting or running, of a tier: whose it is, and since when (seconds) it is there."""

    standing: Standing
    since: float


class Turns:
    """One step's turns: overdue requests, tiers below their floor, then bands and in each the least virtual time.

    What the step will charge counts as it is planned, as `pending` of the standings, until `Policy.commit` settles it.
    `oldest` names the oldest request of each tier that has a `max_wait`.
    """

    def __init__(self, policy: Policy, now: float, oldest: Mapping[str, Oldest] | None = None) -> None:
        self._policy, self._limits = policy, policy.limits
        active = [number for number, band in policy.bands.items() if band.active]
        self._top = active[0] // 2 if active else 0
        self._seconds = policy.limits.tau  # left for tiers below the top one
        self._before: dict[Standing, float] = {}  # virtual times before the first turn
        self._references: dict[int, float] = {}  # by band: the least of those that were served and have admissible work
        self._turn: Turn | None = None
        self.provisional: dict[Standing, float] = {}
        self.admitting = True  # set it False once no slot can be had: who only waits has no turn then
        tiers = policy.config.tiers
        firsts = [(t, (oldest or {}).get(t.name)) for t in tiers if t.max_wait is not None]
        self._overdue = [f.standing for t, f in firsts if f is not None and now - f.since >= (t.max_wait or inf)]
        owed = {t: policy.floors.owed(t.name) for t in tiers}
        self._owed = {t.name: units for t, units in owed.items() if units > 0.0}
        floors = [n for n in active if policy.bands[n].tier in self._owed and n // 2 != self._top]
        self._walks = [_Walk(policy, floors, urgent=True), _Walk(policy, active, urgent=False)]

    def next(self) -> Turn | None:
        """The next turn, to be answered by `served`; None: nobody is left, and the turns are closed."""
        self._turn = self._find()
        return self._turn

    def served(self, units: float, *, more: bool, admissible: bool = False, seconds: float = 0.0) -> None:
        """The turn will be charged `units`, and adds `seconds` to the step. `more`: only its allowance ended it.
        `admissible`: its account has waiting work that was admitted in it, or could have been.
        """
        turn, self._turn = self._turn, None
        assert turn is not None, "no turn is open"
        standing = turn.standing
        before = self._before.setdefault(standing, standing.time)
        if units:
            standing.pending += units
            self.provisional[standing] = self.provisional.get(standing, 0.0) + units
            if admissible:
                self._references[standing.band] = min(self._references.get(standing.band, inf), before)
        if standing.account.tier.rank > self._top:
            self._seconds -= seconds
        if turn.urgent and not turn.oldest:
            self._owed[standing.account.tier.name] -= units
        if more and units and not turn.oldest:
            self._walks[0].again(standing)

    def close(self) -> dict[Standing, float]:
        """No more turns; returns what they will probably charge, for `Policy.commit`."""
        for walk in self._walks:
            walk.close()
        self._walks = []
        return self.provisional

    def _find(self) -> Turn | None:
        if self._overdue:
            standing = self._overdue.pop(0)
            return Turn(standing, self._limits.quantum, oldest=True, urgent=True)
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
            elif not self._paced(found):
                if found.account.tier.rank <= self._top:
                    return Turn(found, self._limits.quantum)
                if self._seconds > 0.0:
                    return Turn(found, self._limits.quantum, self._seconds)
                self.close()
        return None

    def _paced(self, standing: Standing) -> bool:
        """Whether it is too far ahead of somebody who was served and still has admissible work waiting."""
        time = self._before.setdefault(standing, standing.time)
        ahead = time - self._references.get(standing.band, inf)
        return ahead * standing.weight > self._limits.ahead


class _Walk:
    """The active accounts of some bands, the least first; those that are told `again` come again, at their new time."""

    def __init__(self, policy: Policy, bands: list[int], *, urgent: bool) -> None:
        self.urgent = urgent
        self._policy, self._bands = policy, bands
        self._seen: dict[Standing, None] = {}  # taken out of their heaps
        self._again: list[tuple[float, int, Standing]] = []
        self._count = 0

    def again(self, standing: Standing) -> None:
        self._count += 1
        heapq.heappush(self._again, (standing.time, self._count, standing))

    def next(self, *, admitting: bool) -> Standing | None:
        while self._bands:
            fresh = self._fresh(self._policy.bands[self._bands[0]], admitting)
            if self._again and (fresh is None or self._again[0][0] < fresh[0]):
                return heapq.heappop(self._again)[2]
            if fresh is not None:
                self._seen[fresh[2]] = None
                TimeHeap.drop(fresh[2])
                return fresh[2]
            self._bands = self._bands[1:]
        return None

    def _fresh(self, band: Band, admitting: bool) -> tuple[float, int, Standing] | None:
        while True:
            best = band.both.top()
            for heap in (band.running, band.waiting) if admitting else (band.running,):
                top = heap.top()
                if top is not None and (best is None or top[0] < best[0]):
                    best = top
            if best is None or best[2] not in self._seen:
                return best
            TimeHeap.drop(best[2])  # a move of its requests has put it back

    def close(self) -> None:
        for standing in self._seen:
            self._policy.place(standing)
        self._seen = {}
