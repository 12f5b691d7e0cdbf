"""Who is served next: tiers strictly, accounts of a tier by weighted virtual time. Pure: no clock, no I/O.

The virtual time of an account is service / quota, plus the lifts that keep one that was idle from claiming what it did
not use. After Demers et al., SIGCOMM'89 and Sheng et al., VTC, OSDI'24; pacing and eviction distances are ours:

- an account that is more than `pacing` units ahead of the least one with admissible waiting work sits out the step;
- an account gives up a slot or blocks to one of its own tier only when it is more than `eviction` units ahead of it.

`Policy` keeps the standings; `turns` (see `router.qos.turns`) is the order of one step; `commit` settles it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.qos.config import Account, QosConfig, Tier
from router.qos.floors import Floors
from router.qos.ledger import Ledger, Prices
from router.qos.queue import counted
from router.qos.standing import Standing, TimeHeap
from workers.api.ordering import Charge


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one engine, in units of service but for `tau` (seconds).

    `tau` instead of the configuration's.
    """

    step: float  # U: the most that one step can charge
    longest: float = 0.0  # L: the longest context
    pacing: float | None = None  # X; None = U
    eviction: float | None = None  # E; None = X + L: less evicts faster than it serves
    quantum: float = 512.0  # of one turn inside a step
    tau: float | None = None

    @property
    def ahead(self) -> float:
        """X."""
        return self.step if self.pacing is None else self.pacing

    @property
    def distance(self) -> float:
        """E."""
        return self.ahead + self.longest if self.eviction is None else self.eviction

    @property
    def spread(self) -> float:
        """U + max(X, E) + L."""
        return self.step + max(self.ahead, self.distance) + self.longest

    def gap(self, weight: float) -> float:
        """The most by which service / quota of two accounts that wait can drift apart over any interval.

        `weight` is the lesser of their quotas. Holds where one may have to wait for evictions, hence everywhere.
        """
        return 2.0 * self.spread / weight


class Band:
    """The active accounts of one band: those that only wait, those that wait and run, those that only run.

    `queued` of their requests wait.
    """

    __slots__ = ("both", "clock", "kinds", "queued", "running", "tier", "waiting")

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.queued = 0
        self.kinds: dict[tuple[int, float], int] = {}  # accounts that wait, by number of requests and weight
        self.waiting, self.both, self.running = TimeHeap(), TimeHeap(), TimeHeap()
        self.clock = 0.0  # the greatest time at which an account has turned idle

    def place(self, standing: Standing) -> None:
        """It stands where it belongs, at its present time."""
        if standing.queued != standing.counted:
            self._count(standing)
        if standing.queued:
            (self.both if standing.resident else self.waiting).put(standing)
        elif standing.resident:
            self.running.put(standing)
        else:
            TimeHeap.drop(standing)
            self.clock = max(self.clock, standing.time)

    def first_waiting(self) -> Standing | None:
        """The least of the accounts that wait, or None."""
        only, both = self.waiting.first(), self.both.first()
        if only is None or both is None:
            return only or both
        return both if both.time < only.time else only

    def least_waiting(self, most: int) -> list[Standing]:
        """The first `most` of the accounts that wait, the least first."""
        return sorted(self.waiting.least(most) + self.both.least(most), key=lambda s: s.time)[:most]

    def ahead(self, standing: Standing, mine: int) -> float:
        """About how many requests of its other accounts go before number `mine` of `standing`, as quotas go."""
        turns = mine / standing.weight
        found = sum(n * min(queued, turns * weight) for (queued, weight), n in self.kinds.items())
        return found - min(standing.counted, turns * standing.weight)

    @property
    def waits(self) -> bool:
        """Whether anybody does."""
        return bool(len(self.waiting) or len(self.both))

    @property
    def active(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(len(self.waiting) or len(self.both) or len(self.running))

    def _count(self, standing: Standing) -> None:
        before, now = standing.counted, standing.queued
        self.queued += now - before
        if before:
            counted(self.kinds, (before, standing.weight), -1)
        if now:
            counted(self.kinds, (now, standing.weight), 1)
        standing.counted = now


class Policy:
    """The standings of all accounts at one queue of work: an engine's, or the dispatcher's for one model.

    The caller tells every move of a request (`queued`, `admitted`, `evicted`, `ended`, `withdrawn`), asks for the
    order, and tells what was executed. `bands` are by number, the least first.
    """

    def __init__(self, config: QosConfig, limits: Limits, prices: Prices | None = None) -> None:
        self.config, self.limits = config, limits
        self.prices = prices or Prices()
        self.ledger = Ledger()
        self.lifting = True  # False: who returns from idle is lifted elsewhere
        self.floors = Floors(config.tiers, limits.step)
        self.bands: dict[int, Band] = {}
        self._standings: dict[tuple[str, str], Standing] = {}

    @property
    def tau(self) -> float:
        """Predicted seconds that all lower tiers together may add to a step in which a higher one decodes or waits."""
        return self.config.tau if self.limits.tau is None else self.limits.tau

    # moves of requests

    def find(self, key: tuple[str, str]) -> Standing | None:
        """The standing of the account with this key; None if the configuration knows none."""
        found = self._standings.get(key)
        if found is None:
            account = self.config.by_key(key)
            return None if account is None else self.standing(account)
        return found

    @property
    def standings(self) -> Iterable[Standing]:
        """All accounts that were ever seen."""
        return self._standings.values()

    def standing(self, account: Account) -> Standing:
        """The account's; the same object as long as the configuration stands."""
        found = self._standings.get(account.key)
        if found is None:
            found = self._standings[account.key] = Standing(account)
        return found

    def queued(self, standing: Standing) -> None:
        """One more of its requests waits. An account whose queue was empty is lifted: idling earns nothing."""
        standing.queued += 1
        if standing.queued == 1:
            self._lift(standing)
        self.place(standing)

    def admitted(self, standing: Standing) -> None:
        """A waiting request got slot and blocks (or a lease)."""
        standing.queued -= 1
        standing.resident += 1
        self.place(standing)

    def evicted(self, standing: Standing) -> None:
        """A resident request lost them and waits again."""
        standing.resident -= 1
        self.queued(standing)

    def ended(self, standing: Standing) -> None:
        """A resident request is over, for whatever reason. Nothing is taken back: what ran was charged, no more."""
        standing.resident -= 1
        self.place(standing)

    def withdrawn(self, standing: Standing) -> None:
        """A waiting request is over: cancelled, refused, or shed."""
        standing.queued -= 1
        self.place(standing)

    # service

    def expect(self, standing: Standing, units: float) -> None:
        """Leased work will probably be charged `units`; negative: it has been, or will not be."""
        standing.pending += units
        self.place(standing)

    def commit(
        self, executed: int, charges: Sequence[Charge], provisional: Mapping[Standing, float] | None = None
    ) -> None:
        """A step ran `executed` tokens, `charges` say for whom; they replace what it was planned with."""
        self.ledger.book(executed, charges)
        touched: dict[Standing, float] = dict(provisional or ())
        for standing, units in touched.items():
            standing.pending -= units
        per_prefill, per_decode, per_read = self.prices.prefill, self.prices.decode, self.prices.kv_read
        served: dict[int, float] = {}  # by band, where somebody asks
        floors = self.floors.any
        for standing, prefill, decode, kv_read, _ in charges:
            units = per_prefill * prefill + per_decode * decode + per_read * kv_read
            if units:
                standing.service += units
                touched[standing] = 0.0
                if floors:
                    served[standing.band] = served.get(standing.band, 0.0) + units
        for standing in TimeHeap.settled(touched):
            self.place(standing)
        if floors:
            by_tier: dict[str, float] = {}
            for number, units in served.items():
                tier = self.config.tiers[number // 2].name
                by_tier[tier] = by_tier.get(tier, 0.0) + units
            self.floors.served(by_tier, (b.tier for b in self.bands.values() if b.active))

    def victim(
        self, needy: Standing, holders: Iterable[Standing], *, distance: float, urgent: bool = False
    ) -> Standing | None:
        """Whose youngest sequence yields slot or blocks to `needy`; None: nobody's.

        Of those who yield the one in the lowest band, of these the one with the greatest time.
        """
        return self.lowest(self.yielding(needy, holders, distance=distance, urgent=urgent))

    def yielding(
        self, needy: Standing, holders: Iterable[Standing], *, distance: float, urgent: bool = False
    ) -> list[Standing]:
        """All of `holders` that yield slot or blocks to `needy`.

        Those of lower bands; in the own band only who is more than `distance` units ahead. An `urgent` one takes from
        the bands above too, but not from tiers that are owed service themselves.
        """
        found, band, time = [], needy.band, needy.time
        for holder in holders:
            if holder.band == band:
                if (holder.time - time) * holder.weight > distance and holder is not needy:
                    found.append(holder)
            elif holder.band > band or urgent:
                same_tier = holder.band // 2 == band // 2
                if same_tier or self.floors.owed(holder.account.tier.name) <= 0.0:
                    found.append(holder)
        return found

    def lowest(self, holders: Iterable[Standing]) -> Standing | None:
        """Of the lowest band, the one with the greatest time: who yields, too, when a plan comes out empty."""
        return max(holders, key=lambda s: (s.band, s.time), default=None)

    def protects(self, tier: Tier, waited: float) -> bool:
        """Whether the oldest request of `tier`, there for `waited` seconds, is never to be evicted.

        It is so where starvation was ruled out: else it would be begun again and again and never complete.
        """
        return tier.min_share > 0.0 or (tier.max_wait is not None and waited >= tier.max_wait)

    # configuration

    def replace(self, config: QosConfig) -> None:
        """`config` holds from now on; who has no line any more is charged where it says, when it asks next.

        Accounts keep their service and virtual time. One that comes to another tier is lifted there, as if it returned
        from idle. What runs for an account that is gone runs on in the tier of its user.
        """
        old = list(self._standings.values())
        self.config = config
        self.floors = Floors(config.tiers, self.limits.step, self.floors)
        clocks = {(b.tier, number % 2): b.clock for number, b in self.bands.items()}
        for standing in old:
            TimeHeap.drop(standing)
            standing.counted = 0
        self._standings, self.bands = {}, {}
        moved: list[Standing] = []
        for standing in old:
            before = standing.account
            after = config.account(before.id, before.tier.name)
            if after.id != before.id:
                if not (standing.queued or standing.resident):
                    continue
                after = Account(after.tier, before.id, after.quota)
            standing.assign(after)
            self._standings[after.key] = standing
            (self.place if after.tier.name == before.tier.name else moved.append)(standing)
        for number, band in self.bands.items():
            band.clock = max(band.clock, clocks.get((band.tier, number % 2), 0.0))
        for standing in moved:
            self._lift(standing)
            self.place(standing)

    # inside

    def band(self, standing: Standing) -> Band:
        """The band of `standing`."""
        found = self.bands.get(standing.band)
        if found is None:
            found = self.bands[standing.band] = Band(standing.account.tier.name)
            self.bands = dict(sorted(self.bands.items()))
        return found

    def place(self, standing: Standing) -> None:
        """Its time or its work has changed: it stands where it belongs."""
        band = self.bands.get(standing.band)
        (band or self.band(standing)).place(standing)

    def _lift(self, standing: Standing) -> None:
        if not self.lifting:
            return
        band = self.band(standing)
        TimeHeap.drop(standing)  # it is not its own measure
        first = band.first_waiting()
        floor = max((s.time for s in band.running), default=band.clock) if first is None else first.time
        standing.offset += max(floor - standing.time, 0.0)
