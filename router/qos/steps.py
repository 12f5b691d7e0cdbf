"""The policy as an engine takes it (`workers.api.ordering.Ordering`): accounts are its flows.

One object an engine. The cluster's service comes in by `sync`: an account then stands where the cluster has it, divided
by the replicas, plus what was executed here since. With raw counters all replicas would chase the same user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from router.qos.config import DEFAULT, Account, QosConfig, Tier
from router.qos.least_first import LeastFirst
from router.qos.ledger import Prices
from router.qos.policy import Limits, Policy
from router.qos.standing import Standing
from router.qos.turns import Oldest, Turns
from workers.api.ordering import Charge, Service, ServiceReport, ServiceSync
from workers.api.replica import ReplicaInfo
from workers.api.request import EngineRequest

REPORT_SECONDS = 0.05


def step_limits(
    prices: Prices, *, step_tokens: int, pool_tokens: int, context: int, tau: float | None = None
) -> Limits:
    """The limits of an engine that runs `step_tokens` a step over `pool_tokens` of cache, `context` a sequence."""
    step = prices.most_a_step(step_tokens, pool_tokens)
    return Limits(step, longest=prices.prefill * min(context, pool_tokens), tau=tau)


def engine_limits(info: ReplicaInfo, prices: Prices) -> Limits:
    """The limits of the engine that `info` describes."""
    pool = info.num_blocks * info.block_size
    return step_limits(prices, step_tokens=info.max_num_batched_tokens, pool_tokens=pool, context=info.max_model_len)


class StepOrder:
    """Orders the steps of one engine by `config`. `prices` and `limits` are in units of service."""

    def __init__(self, config: QosConfig, limits: Limits, prices: Prices | None = None) -> None:
        self.policy = Policy(_ordered(config), limits, prices)
        self._live: dict[str, _Live] = {}  # of tiers that may not starve
        self._changed: dict[Standing, None] = {}  # since the last report
        self._left: tuple[Service, ...] = ()  # what changed before the configuration did, not yet reported
        self._reported = -inf
        self._greeting = False

    @property
    def prices(self) -> Prices:
        """Units a token."""
        return self.policy.prices

    # moves

    def flow(self, request: EngineRequest) -> Standing:
        """The account of the request's owner."""
        return self.policy.standing(self.policy.config.account(request.owner, request.tier))

    def arrived(self, flow: Standing, request_id: str, since: float) -> None:  # noqa: D102
        self.policy.queued(flow)
        self._changed[flow] = None
        tier = flow.account.tier
        if tier.min_share or tier.max_wait is not None:
            self._live.setdefault(tier.name, _Live()).add(request_id, flow, since)

    def admitted(self, flow: Standing) -> None:  # noqa: D102
        self.policy.admitted(flow)
        self._changed[flow] = None

    def evicted(self, flow: Standing) -> None:  # noqa: D102
        self.policy.evicted(flow)
        self._changed[flow] = None

    def ended(self, flow: Standing, request_id: str, *, resident: bool) -> None:  # noqa: D102
        (self.policy.ended if resident else self.policy.withdrawn)(flow)
        self._changed[flow] = None
        for live in self._live.values():
            live.discard(request_id)

    # a step

    def undisputed(self, now: float, *, base: float, seconds: float, admitting: bool) -> bool:  # noqa: D102
        policy = self.policy
        top: Tier | None = None
        above = False  # somebody of a higher band waits
        for number, band in policy.bands.items():
            running = len(band.running) + len(band.both)
            waits = bool(len(band.waiting) or len(band.both))
            if not running and not waits:
                continue
            if (waits and admitting) or (running and above):
                return False
            if top is None:
                top = policy.config.tiers[number // 2]
            elif band.tier != top.name and running and seconds > min(policy.tau, top.filled - base):
                return False
            if waits:
                above = True
                least = band.first_waiting()
                if least is not None and running:
                    floor, most = least.time, policy.limits.distance
                    for standing in (*band.both, *band.running):
                        if (standing.time - floor) * standing.weight > most:
                            return False
                if policy.floors.owed(band.tier) > 0.0:
                    return False
        return not any(oldest.since + (tier.max_wait or 0.0) <= now for tier, oldest in self._deadlines())

    def turns(self, now: float, *, base: float, bounded: bool) -> Turns:  # noqa: D102
        oldest = {t.name: oldest for t, oldest in self._deadlines()}
        return Turns(self.policy, now, oldest, base=base, bounded=bounded)

    def victim(
        self, needy: Standing, holders: Iterable[Standing], *, admission: bool, urgent: bool, patient: bool
    ) -> Standing | None:
        """By the policy; nobody of the own band where it is `patient`."""
        distance = self._distance(admission=admission, patient=patient)
        return self.policy.victim(needy, holders, distance=distance, urgent=urgent)

    def yielding(  # noqa: D102
        self, needy: Standing, holders: Iterable[Standing], *, admission: bool, urgent: bool, patient: bool
    ) -> list[Standing]:
        distance = self._distance(admission=admission, patient=patient)
        return self.policy.yielding(needy, holders, distance=distance, urgent=urgent)

    def lowest(self, holders: Iterable[Standing]) -> Standing | None:  # noqa: D102
        return self.policy.lowest(holders)

    def protected(self, now: float) -> Iterator[str]:  # noqa: D102
        for tier in self.policy.config.tiers:
            oldest = self._oldest(tier)
            if oldest is not None and self.policy.protects(tier, now - oldest.since):
                yield str(oldest.request)

    def expect(self, charges: Iterable[Charge]) -> dict[Standing, float]:  # noqa: D102
        prices, expected = self.prices, {}
        for standing, prefill, decode, kv_read, _ in charges:
            expected[standing] = units = prices.units(prefill, decode, kv_read)
            standing.pending += units
        return expected

    def executed(self, executed: int, charges: list[Charge], expected: dict[Standing, float] | None) -> None:  # noqa: D102
        self.policy.commit(executed, charges, expected)
        changed = self._changed
        for charge in charges:
            changed[charge.flow] = None

    # the cluster

    def report(self, now: float) -> ServiceReport | None:
        """Totals since the start, of the accounts that have changed; at most one in REPORT_SECONDS."""
        if now - self._reported < REPORT_SECONDS or not (self._changed or self._left or self._greeting):
            return None
        ledger, whole = self.policy.ledger, self._greeting
        rows = (*self._left, *map(self._row, self._changed))
        self._changed, self._left, self._reported, self._greeting = {}, (), now, False
        return ServiceReport(ledger.executed, ledger.overhead, rows, whole)

    def greet(self) -> None:
        """The next report comes at once and has all accounts, those of earlier configurations too."""
        self._greeting, self._left = True, ()
        for key, totals in self.policy.ledger.accounts.items():
            standing = self.policy.find(key)
            if standing is not None:
                self._changed[standing] = None
            else:  # where it stood, the account that took its place stands, or nobody
                self._left += (Service(key, totals.prefill, totals.decode, totals.kv_read, 0.0, 0.0, 0),)
        self._reported = -inf

    def sync(self, message: ServiceSync) -> None:
        """Accounts stand where the cluster has them. Lifts are in its times; none are made here from now on."""
        self.policy.lifting = False
        for served in message.accounts:
            standing = self.policy.find((served.key[0], served.key[1]))
            if standing is not None:
                standing.offset = served.time - served.units / standing.weight
                self.policy.place(standing)

    def replace(self, config: QosConfig) -> None:
        """`config` holds from now on. What is here runs and waits on where it is."""
        self._left += tuple(map(self._row, self._changed))  # by their old names, under which they were charged
        self._changed = {}
        self.policy.replace(_ordered(config))

    # inside

    def _distance(self, *, admission: bool, patient: bool) -> float:
        return inf if patient else self.policy.limits.distance if admission else 0.0

    def _row(self, s: Standing) -> Service:
        totals = self.policy.ledger.totals(s.key)
        time = s.service / s.weight + s.offset
        return Service(s.key, totals.prefill, totals.decode, totals.kv_read, s.service, time, s.queued)

    def _oldest(self, tier: Tier) -> Oldest | None:
        live = self._live.get(tier.name)
        return None if live is None else live.first()

    def _deadlines(self) -> Iterator[tuple[Tier, Oldest]]:
        """The oldest request of each tier with a `max_wait`."""
        if self._live:
            for tier in self.policy.config.tiers:
                if tier.max_wait is not None and (oldest := self._oldest(tier)) is not None:
                    yield tier, oldest


class _Live:
    """The live requests of a tier by when they first came: replays and parts of beam searches arrive late."""

    def __init__(self) -> None:
        self._order: LeastFirst[str] = LeastFirst()
        self._requests: dict[str, Oldest] = {}  # by their ids

    def add(self, request_id: str, standing: Standing, since: float) -> None:
        self._requests[request_id] = Oldest(standing, since, request_id)
        self._order.put(request_id, since)

    def discard(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._order.drop(request_id)

    def first(self) -> Oldest | None:
        request_id = self._order.first()
        return None if request_id is None else self._requests[request_id]


def _ordered(config: QosConfig) -> QosConfig:
    """`config`, or one account for all where QoS is switched off: first come, first served."""
    if config.enabled:
        return config
    tier = Tier(0, DEFAULT)
    return QosConfig((tier,), (Account(tier, DEFAULT, 1.0),))
