"""The dispatcher's waiting room in the policy's order: tiers, accounts by virtual time, users of an account in turn.

Requests leave it for a lease (`granted`) or for good (`remove`). A lease counts with what it will probably be charged,
less what its replica has reported, until it has ended, and from then on with what was executed: nobody gains by asking
for little or by being cancelled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from router.qos.config import QosConfig, Tier
from router.qos.members import Members, Place
from router.qos.outlook import Errors, Outlook, Pace
from router.qos.policy import Limits, Policy
from router.qos.queue import Seat, TierState, counted
from router.qos.standing import Standing
from router.qos.watch import Reading, Watch
from workers.api.ordering import Charge

_SAMPLE = 8  # one request in so many teaches how good predictions are, where a position costs a look at many accounts
_FEW = 16  # accounts, of which every request teaches

_LOOK_SECONDS = 1.0  # between two looks at the gaps between accounts

Item = TypeVar("Item")


class Facts(NamedTuple):
    """What the order depends on. `tier` is the API key's, for users without a line; `units` will probably be charged.

    `accepted`: a replay; it goes before its user's other requests and is never refused or shed. `sub`: which of the
    user's own users asks; they share its place in turn. `priority`: among the requests of one user, and sub-user, the
    least goes first; nobody else is served sooner or later for it.
    """

    user: str
    tier: str
    units: float
    arrived: float
    accepted: bool = False
    sub: str = ""
    priority: int = 0


@dataclass(slots=True)
class _Entry(Generic[Item]):
    item: Item
    facts: Facts
    standing: Standing
    place: tuple[float, int]  # when it was taken, and its number: by itself, or by one of its user's that goes after it
    predicted: float = 0.0  # seconds, by position; 0: not looked at
    queued: float = 0.0


class FairQueue(Generic[Item]):
    """Items by id. `describe` gives an item's facts, `clock` monotonic seconds; `limit` bounds all that wait."""

    def __init__(
        self,
        config: QosConfig,
        limits: Limits,
        *,
        describe: Callable[[Item], Facts],
        clock: Callable[[], float],
        limit: int,
    ) -> None:
        self.policy = Policy(config, limits)
        self._describe, self._clock, self._limit = describe, clock, limit
        self._waiting: dict[str, _Entry[Item]] = {}
        self._aside: dict[str, _Entry[Item]] = {}
        self._of_tier: dict[str, dict[str, _Entry[Item]]] = {}  # both, by tier, in the order they were queued
        self._leased: dict[str, tuple[Standing, float]] = {}
        self._leased_units: dict[Standing, float] = {}  # of the leases that stand, in units
        self._members: dict[Standing, Members] = {}
        self._oldest: dict[
            str, list[tuple[tuple[float, int], str]]
        ] = {}  # by tier with a max_wait: all that wait, a heap
        self._lanes: dict[str, str] = {}  # by tier: the overdue request that holds a lease
        self._user_count: dict[tuple[str, str], int] = {}  # by (tier, user)
        self._pushed = 0
        self._pace = Pace()
        self._errors: dict[str, Errors] = {}
        self.steps = 0.0  # see `Watch.look`
        self._watch = Watch()
        self._looked_at = float("-inf")
        self._readings: dict[str, Reading] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._waiting

    def __iter__(self) -> Iterator[Item]:
        """All that wait, in the order they were queued."""
        return (entry.item for entry in self._waiting.values())

    @property
    def waiting_by_user(self) -> Mapping[tuple[str, str], int]:
        """How many wait, by tier and user; it changes as they come and go."""
        return self._user_count

    def waiting_of(self, user: str) -> int:
        """How many of `user` wait."""
        return sum(self._user_count.get((tier.name, user), 0) for tier in self.policy.config.tiers)

    # in and out

    def refusal(self, item: Item) -> str | None:
        """Why `item` must not wait here, in words; None if it may. Accepted work always may."""
        facts = self._describe(item)
        if facts.accepted:
            return None
        tier = self.policy.config.account(facts.user, facts.tier).tier
        if self._user_count.get((tier.name, facts.user), 0) >= tier.max_queued_per_user:
            return f"{tier.max_queued_per_user} of your requests wait already"
        if len(self._of_tier.get(tier.name, ())) >= tier.max_queued:
            return f"{tier.max_queued} requests wait in tier {tier.name} already"
        if len(self._waiting) >= self._limit and self._to_shed(tier) is None:
            return f"{len(self._waiting)} requests wait already"
        return None

    def shed(self, item: Item) -> Item | None:
        """What leaves so that `item` may wait: the youngest of the lowest tier, once the room is full; taken out."""
        if len(self._waiting) < self._limit:
            return None
        facts = self._describe(item)
        item_id = self._to_shed(self.policy.config.account(facts.user, facts.tier).tier)
        return None if facts.accepted or item_id is None else self.remove(item_id)

    def push(self, item_id: str, item: Item) -> None:
        """Queue `item`; its id must not be queued already (ValueError). Limits are for `refusal` to see to."""
        if item_id in self._waiting:
            raise ValueError(f"{item_id} waits already")
        facts = self._describe(item)
        standing = self.policy.standing(self.policy.config.account(facts.user, facts.tier))
        self._pushed += 1
        place = (facts.arrived, self._pushed)
        entry = self._waiting[item_id] = _Entry(item, facts, standing, place, queued=self._clock())
        self._of_tier.setdefault(standing.account.tier.name, {})[item_id] = entry
        self.policy.queued(standing)
        self._enter(item_id, entry)
        if len(self._members) <= _FEW or self._pushed % _SAMPLE == 0:
            entry.predicted = self._position(item_id) * self._pace.seconds()

    def remove(self, item_id: str) -> Item | None:
        """Take `item_id` out for good, wherever it stands; None if it does not wait."""
        entry = self._waiting.pop(item_id, None)
        if entry is None:
            return None
        del self._of_tier[entry.standing.account.tier.name][item_id]
        self._leave(item_id, entry)
        self.policy.withdrawn(entry.standing)
        self._look_whether_empty(entry.standing)
        return entry.item

    def granted(self, item_id: str) -> None:
        """`item_id` leaves for a lease: it is the next one, or a head that waits in an engine for its turn."""
        entry = self._waiting[item_id]
        standing, tier = entry.standing, entry.standing.account.tier
        if tier.max_wait is not None:
            self._take_oldest_place(item_id, entry)
        del self._waiting[item_id], self._of_tier[tier.name][item_id]
        self._leave(item_id, entry, units=entry.facts.units)
        self.policy.admitted(standing)
        self._look_whether_empty(standing)
        now = self._clock()
        overdue = tier.max_wait is not None and now - entry.place[0] >= tier.max_wait
        if overdue:
            self._lanes.setdefault(tier.name, item_id)
        self._lease(item_id, standing, entry.facts.units, in_turn=not overdue)
        self._pace.released(now, more=bool(self._waiting))
        self._errors.setdefault(tier.name, Errors()).add(entry.predicted, now - entry.queued)

    def adopt(self, item_id: str, item: Item) -> None:
        """`item` holds a lease that was granted before this queue knew of it."""
        facts = self._describe(item)
        standing = self.policy.standing(self.policy.config.account(facts.user, facts.tier))
        standing.resident += 1
        self._lease(item_id, standing, facts.units, in_turn=False)

    def ended(
        self, item_id: str, prefill: int = 0, decode: int = 0, kv_read: int = 0, *, charged: bool = False
    ) -> None:
        """The lease is over: what was executed, in tokens, is charged, and no more; `charged`: it has been, or will be
        by `served`. Unknown ids are left alone.
        """
        held = self._leased.pop(item_id, None)
        if held is None:
            return
        standing, expected = held
        tier = standing.account.tier.name
        if self._lanes.get(tier) == item_id:
            del self._lanes[tier]
        self.policy.ended(standing)
        self.policy.floors.served({tier: -expected}, self._active())  # it counted when it was granted
        self._leased_units[standing] -= expected
        if charged:  # of what was expected, the part that was executed is no longer pending: `served` took it out
            self._settle_pending(standing, self.policy.prices.units(prefill, decode, kv_read) - expected)
        else:
            self.policy.commit(prefill + decode, [Charge(standing, prefill, decode, kv_read)], {standing: expected})
        billed = prefill or decode or not charged  # else it was charged step by step, and ended without a bill
        units = self.policy.prices.units(prefill, decode, kv_read) if billed else expected
        self._watch.ended(standing.account, expected, units)

    def served(self, executed: int, overhead: int, charges: list[Charge]) -> None:
        """Replicas executed so many tokens, for these accounts, and for nobody."""
        self.policy.commit(executed - overhead, charges)
        self.policy.ledger.waste(overhead)
        for standing, prefill, decode, kv_read, _ in charges:
            self._settle_pending(standing, -self.policy.prices.units(prefill, decode, kv_read))

    def _settle_pending(self, standing: Standing, change: float) -> None:
        """Never beyond what its leases were expected to cost: what a bill and the reports differ by must not add up."""
        after = min(max(standing.pending + change, 0.0), max(self._leased_units.get(standing, 0.0), 0.0))
        self.policy.expect(standing, after - standing.pending)

    def set_aside(self, item_id: str) -> None:
        """It is passed over until `put_back`."""
        entry = self._aside[item_id] = self._waiting.pop(item_id)
        self._leave(item_id, entry)
        entry.standing.queued -= 1
        self.policy.place(entry.standing)
        self._look_whether_empty(entry.standing)

    def put_back(self) -> None:
        """All that was set aside waits again; nobody is lifted for it."""
        for item_id, entry in self._aside.items():
            self._waiting[item_id] = entry
            entry.standing.queued += 1
            self.policy.place(entry.standing)
            self._enter(item_id, entry)
        self._aside.clear()

    def since(self, item_id: str) -> float | None:
        """When the place was taken at which `item_id`, which waits, would be released now; None: when it came."""
        entry = self._waiting[item_id]
        if entry.standing.account.tier.max_wait is None:
            return None
        return self._waiting[self._oldest_of(item_id, entry)].place[0]

    # the order

    def peek(self) -> Item | None:
        """What is released next: an overdue request, a tier below its floor, then the first tier's least account."""
        item_id = self.first()
        return None if item_id is None else self._waiting[item_id].item

    def first(self) -> str | None:
        """Its id."""
        if not self._waiting:
            return None
        overdue = self._overdue()
        if overdue is not None:
            return overdue
        standing: Standing | None = None
        for band in self.policy.bands.values():
            least = band.first_waiting()
            if least is not None:
                standing = standing or least
                if self.policy.floors.owed(band.tier) > 0.0:
                    standing = least
                    break
        assert standing is not None, "requests wait, but no account does"
        return self._members[standing].first()

    def outlook(self, item_id: str, seconds: float = 1.0) -> Outlook:
        """Where a waiting request stands, and how long it will probably wait from now on. Raises KeyError."""
        position = self._position(item_id)
        return self._expected(position, self._waiting[item_id].standing.account.tier, seconds)

    def prospect(self, item: Item, seconds: float = 1.0) -> Outlook:
        """The same for one that does not wait, if it did."""
        facts = self._describe(item)
        standing = self.policy.standing(self.policy.config.account(facts.user, facts.tier))
        members = self._members.get(standing)
        return self._expected(self._place(standing, len(members or ()) + 1), standing.account.tier, seconds)

    def tiers(self) -> list[TierState]:
        """Every tier of the configuration; looks after the gaps between accounts."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            accounts = [s.account for s, members in self._members.items() if members]
            self._readings = self._watch.look(now, accounts, self.steps)
        states, above = [], 0
        for tier in self.policy.config.tiers:
            waiting = self._of_tier.get(tier.name, {})
            oldest = next((now - entry.facts.arrived for entry in waiting.values()), 0.0)
            above += len(waiting)
            outlook = self._expected(above + 1, tier, 1.0) if above else Outlook(1, 0.0, 0.0, 0.0)
            reading = self._readings.get(tier.name, Reading())
            states.append(TierState(tier.name, len(waiting), oldest, outlook, reading))
        return states

    def ahead(self, item: Item) -> int:
        """What waits in its tier and in those above."""
        facts = self._describe(item)
        rank = self.policy.config.account(facts.user, facts.tier).tier.rank
        return sum(len(self._of_tier.get(t.name, ())) for t in self.policy.config.tiers if t.rank <= rank)

    def seat(self, item: Item) -> Seat:
        """Its account's."""
        facts = self._describe(item)
        account = self.policy.config.account(facts.user, facts.tier)
        return Seat(account.tier.rank, account.key)

    def fronts(self, most: int) -> list[Item]:
        """The next request of each account that waits, of the first `most` in the order of service."""
        found: list[Item] = []
        for band in self.policy.bands.values():
            found += (self._waiting[self._members[s].first()].item for s in band.least_waiting(most - len(found)))
        return found

    def replace(self, config: QosConfig) -> None:
        """`config` holds from now on, for what waits too. Service and virtual times stand; nothing is dropped."""
        entries = sorted(self._waiting.items(), key=lambda entry: entry[1].queued)  # some may have been set aside
        for item_id, entry in entries:
            self._leave(item_id, entry)
            entry.standing.queued -= 1
        self.policy.replace(config)
        self._members.clear()
        self._oldest.clear()
        moved = []
        for item_id, entry in entries:
            standing = self.policy.standing(config.account(entry.facts.user, entry.facts.tier))
            if standing is entry.standing:
                standing.queued += 1
                self.policy.place(standing)
                self._enter(item_id, entry)
            else:
                moved.append((item_id, entry, standing))
        for item_id, entry, standing in moved:
            entry.standing = standing
            self.policy.queued(standing)
            self._enter(item_id, entry)
        self._of_tier.clear()
        for item_id, entry in entries:
            self._of_tier.setdefault(entry.standing.account.tier.name, {})[item_id] = entry
        self._watch.restart((standing.account, units) for standing, units in self._leased.values())

    # inside

    def _enter(self, item_id: str, entry: _Entry[Item]) -> None:
        standing, facts = entry.standing, entry.facts
        tier = standing.account.tier
        members = self._members.get(standing)
        if members is None:
            members = self._members[standing] = Members()
        members.push(facts.user, item_id, Place(not facts.accepted, facts.priority, facts.arrived), facts.sub)
        if tier.max_wait is not None:
            heapq.heappush(self._oldest.setdefault(tier.name, []), (entry.place, item_id))
        counted(self._user_count, (tier.name, facts.user), 1)

    def _leave(self, item_id: str, entry: _Entry[Item], units: float = 0.0) -> None:
        self._members[entry.standing].remove(item_id, units)
        counted(self._user_count, (entry.standing.account.tier.name, entry.facts.user), -1)

    def _lease(self, item_id: str, standing: Standing, units: float, *, in_turn: bool) -> None:
        self._leased[item_id] = (standing, units)
        self._leased_units[standing] = self._leased_units.get(standing, 0.0) + units
        self._watch.granted(standing.account, units, in_turn=in_turn)
        self.policy.expect(standing, units)
        self.policy.floors.served({standing.account.tier.name: units}, self._active())

    def _look_whether_empty(self, standing: Standing) -> None:
        if not self._members[standing]:
            self._watch.emptied(standing.account)

    def _active(self) -> list[str]:
        return [band.tier for band in self.policy.bands.values() if band.first_waiting() is not None]

    def _overdue(self) -> str | None:
        """Of the user who has waited for too long, the request that he wants first."""
        now = self._clock()
        for tier in self.policy.config.tiers:
            heap = self._oldest.get(tier.name)
            while heap and not self._is_place(*heap[0]):
                heapq.heappop(heap)
            if heap and tier.name not in self._lanes and now - heap[0][0][0] >= (tier.max_wait or 0.0):
                item_id = heap[0][1]
                line = self._members[self._waiting[item_id].standing].line_of(item_id)
                return line.first() if line.mixed else item_id
        return None

    def _is_place(self, place: tuple[float, int], item_id: str) -> bool:
        entry = self._waiting.get(item_id)
        return entry is not None and entry.place == place

    def _oldest_of(self, item_id: str, entry: _Entry[Item]) -> str:
        """Which of its user's requests has the oldest place."""
        line = self._members[entry.standing].line_of(item_id)
        return min(line.live, key=lambda i: self._waiting[i].place) if line.mixed else item_id

    def _take_oldest_place(self, item_id: str, entry: _Entry[Item]) -> None:
        """It goes before its user's older ones, by its priority: of his places the oldest one is used up. Else whoever
        lets one of his own wait could be overdue, and go before others, whenever he likes.
        """
        oldest = self._oldest_of(item_id, entry)
        other = self._waiting[oldest]
        if other.place < entry.place:
            entry.place, other.place = other.place, entry.place
            heapq.heappush(self._oldest[entry.standing.account.tier.name], (other.place, oldest))

    def _to_shed(self, newcomer: Tier) -> str | None:
        """The youngest request of the lowest tier below `newcomer`."""
        lowest = next((t for t in reversed(self.policy.config.tiers) if self._of_tier.get(t.name)), newcomer)
        if lowest.rank <= newcomer.rank:
            return None
        youngest_first = reversed(self._of_tier[lowest.name].items())
        return next((item_id for item_id, entry in youngest_first if not entry.facts.accepted), None)

    def _position(self, item_id: str) -> int:
        """How many will have been released with it, if nobody else comes: of its tier as quotas go, of others all."""
        standing = self._waiting[item_id].standing
        return self._place(standing, self._members[standing].ahead(item_id) + 1)

    def _place(self, standing: Standing, mine: int) -> int:
        """The same for the request that is number `mine` of its account."""
        position = float(mine)
        for number, band in self.policy.bands.items():
            if number < standing.band:
                position += band.queued
            elif number == standing.band:
                position += band.ahead(standing, mine)
        return round(position)

    def _expected(self, position: int, tier: Tier, seconds: float) -> Outlook:
        errors = self._errors.setdefault(tier.name, Errors())
        return errors.outlook(position, position * self._pace.seconds(seconds))
