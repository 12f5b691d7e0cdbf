"""The order of one engine step: whose turn it is next, and how much of it.

The engine serves one turn after the other until the step is full or `next` returns None, and tells what each turn came
to. Which sequences, blocks and tokens that means is its own matter; nothing here knows them.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

from router.qos.policy import Band, Policy
from router.qos.standing import Standing, TimeHeap
from workers.api.ordering import Rest, Turn

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
        self._limits, self._pacing, self._tau = policy.limits, policy.limits.ahead, policy.tau
        active = [number for number, band in policy.bands.items() if band.active]
        top = active[0] // 2 if active else 0
        self._highest, self._last_of_top = policy.config.tiers[top], 2 * top + 1
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
        floors = [n for n in active if policy.bands[n].tier in self._owed and n // 2 != top]
        self._walks = [_Walk(policy, floors, urgent=True)] if floors else []
        self._walks.append(_Walk(policy, active, urgent=False))

    def next(self) -> Turn | None:
        """The next turn, to be answered by `served`; None: nobody is left, and the turns are closed."""
        turn: Turn | None = None
        if self._overdue:
            first = self._overdue.pop(0)
            turn = Turn(first.standing, self._limits.quantum, only=first.request, urgent=True)
        while turn is None and self._walks:
            walk = self._walks[0]
            found = walk.next(admitting=self.admitting or walk.urgent)
            if found is None:
                walk.close()
                self._walks.pop(0)
            elif walk.urgent:
                owed = self._owed[found.account.tier.name]
                if owed > 0.0:
                    turn = Turn(found, min(owed, self._limits.quantum), urgent=True)
            elif self._references and self._is_ahead(found):
                continue
            elif found.band <= self._last_of_top:
                if found.turn is None:
                    found.turn = Turn(found, self._limits.quantum)
                turn = found.turn
            elif (left := self._left()) > 0.0:
                turn = Turn(found, self._limits.quantum, left)
            else:
                self.close()
        self._turn = turn
        return turn

    def served(self, units: float, *, more: bool, admissible: bool = False, seconds: float = 0.0) -> None:
        """See `workers.api.ordering.Turns`."""
        turn, self._turn = self._turn, None
        assert turn is not None, "no turn is open"
        standing: Standing = turn.flow
        if units and admissible:
            reference = self._references.get(standing.band, inf)
            self._references[standing.band] = min(reference, self._before(standing))
        self._charge(standing, units, seconds)
        if turn.urgent and turn.only is None:
            self._owed[standing.account.tier.name] -= units
        if more and units and turn.only is None:
            self._walks[0].again(standing)

    def rest(self) -> Rest | None:
        """See `workers.api.ordering.Turns`."""
        if self._overdue or not self._walks or self._walks[0].urgent:
            return None
        standings = self._walks[0].rest(admitting=self.admitting)
        if self._references:
            standings = [s for s in standings if not self._is_ahead(s)]
        if not standings:
            return None
        is_bounded = standings[0].band > self._last_of_top
        return Rest(standings, self._limits.quantum, self._left() if is_bounded else inf)

    def all_served(self, served: Iterable[tuple[Standing, float, float]]) -> None:
        """See `workers.api.ordering.Turns`."""
        provisional, last_of_top = self.provisional, self._last_of_top
        own = added = 0.0
        for standing, units, seconds in served:  # as `_charge` does, without a call for each
            if units:
                standing.pending += units
                provisional[standing] = provisional.get(standing, 0.0) + units
            if standing.band > last_of_top:
                added += seconds
            else:
                own += seconds
        self._own, self._added = self._own + own, self._added + added
        self._walks[0].pass_rest()

    def close(self) -> dict[Standing, float]:
        """No more turns; returns what they will probably charge, for `Policy.commit`."""
        for walk in self._walks:
            walk.close()
        self._walks = []
        return self.provisional

    def _charge(self, standing: Standing, units: float, seconds: float) -> None:
        """It has had a turn."""
        if units:
            standing.pending += units
            provisional = self.provisional
            provisional[standing] = provisional.get(standing, 0.0) + units
        if standing.band > self._last_of_top:
            self._added += seconds
        else:
            self._own += seconds

    def _left(self) -> float:
        """Seconds that tiers below the highest one may add, now that it has had its turns."""
        if not self._bounded:
            return inf
        return min(self._tau, self._highest.spare(self._own)) - self._added

    def _is_ahead(self, standing: Standing) -> bool:
        """Whether it is too far ahead of somebody who was served and still has admissible work waiting."""
        reference = self._references.get(standing.band)
        if reference is None:
            return False
        pending = standing.pending - self.provisional.get(standing, 0.0)
        ahead = standing.service + pending + (standing.offset - reference) * standing.weight
        return ahead > self._pacing

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
        self._end = 0  # of those of `_residents` that `rest` left out
        self._seen: set[Standing] = set()
        self._dropped: list[Standing] = []  # taken out of their heap
        self._again: list[_Place] = []
        self._count = 0

    def again(self, standing: Standing) -> None:
        self._count += 1
        heapq.heappush(self._again, (standing.time, self._count, standing))

    def next(self, *, admitting: bool) -> Standing | None:
        while self._bands:
            residents = self._unseen_residents(self._policy.bands[self._bands[0]])
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
            self._pass_band()
        return None

    def rest(self, *, admitting: bool) -> list[Standing]:
        """Who comes next, one after the other, and nobody can come between them: of those with residents the ones
        before the first that may be admitted something.
        """
        while self._bands and not self._again:
            band = self._policy.bands[self._bands[0]]
            residents = self._unseen_residents(band)
            top = self._first_waiting(band) if admitting else None
            if not residents and top is None:
                self._pass_band()
                continue
            until = inf if top is None else top[0]
            left, end = [], len(residents)
            while end:
                standing = residents[end - 1]
                if standing not in self._seen:
                    if admitting and (standing.queued or _time(standing) > until):
                        break
                    left.append(standing)
                end -= 1
            self._end = end
            return left
        return []

    def pass_rest(self) -> None:
        """All that `rest` named last had their turns, or are not to have them."""
        assert self._residents is not None
        del self._residents[self._end :]

    def _pass_band(self) -> None:
        """All of it had their turns."""
        self._bands, self._residents = self._bands[1:], None

    def _unseen_residents(self, band: Band) -> list[Standing]:
        """The band's standings with residents that had no turn, the least last; later ones may have had theirs."""
        residents = self._residents
        if residents is None:
            residents = self._residents = _sorted_residents(band)
        while residents and residents[-1] in self._seen:
            residents.pop()
        return residents

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
