"""G6, G11 and the trace `slots`: shares in a cluster, with counters that replicas hear of late; and its live metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import combinations
from unittest import mock

from router.dispatch.dispatcher import DispatcherConfig
from router.qos.policy import Policy
from router.qos.standing import Standing
from router.qos.steps import StepOrder
from simulation.cluster import Cluster, EngineMachine
from simulation.jobs import Job, Maker
from simulation.orderings import orderings_of
from simulation.replica import Shape
from simulation.rows import Row, at_most, gap_bound, longest_of, step_units, tiers
from workers.api.ordering import Charge

SHAPE = Shape(slots=32, pool=120_000)
SYNCS = (0.05, 0.2, 1.0)
_LEARNED = 8.0  # seconds; until the first long answers have ended nobody knows how long they are

Traffic = Callable[[int, float], list[Job]]  # (replicas, seconds) -> more than they can do


class Drift:
    """The greatest drift of service / quota over any interval through which both of a pair wait for leases."""

    def __init__(self, quotas: dict[str, float]) -> None:
        self.worst = 0.0  # times the lesser quota
        self._quotas = quotas
        self._spans: dict[tuple[str, str], list[float]] = {}

    def look(self, cluster: Cluster, units: dict[str, float]) -> None:
        """At a tick."""
        quotas = self._quotas
        for a, b in combinations(quotas, 2):
            if not (cluster.waiting[a] and cluster.waiting[b]):
                self._spans.pop((a, b), None)
                continue
            gap = units.get(a, 0.0) / quotas[a] - units.get(b, 0.0) / quotas[b]
            span = self._spans.setdefault((a, b), [gap, gap])
            span[0], span[1] = min(span[0], gap), max(span[1], gap)
            self.worst = max(self.worst, (span[1] - span[0]) * min(quotas[a], quotas[b]))


class ClusterGaps:
    """Drifts, from the very start and since _LEARNED; and shares."""

    def __init__(self, quotas: dict[str, float]) -> None:
        self.quotas = quotas
        self.units: dict[str, float] = {}
        self.begun: dict[str, float] = {}  # at _LEARNED
        self._all, self._learned = Drift(quotas), Drift(quotas)

    def __call__(self, cluster: Cluster) -> None:
        """At a tick."""
        self.units = units_of(cluster)
        self._all.look(cluster, self.units)
        if cluster.now >= _LEARNED:
            self.begun = self.begun or dict(self.units)
            self._learned.look(cluster, self.units)

    @property
    def worst(self) -> float:
        """Since _LEARNED."""
        return self._learned.worst

    @property
    def worst_from_start(self) -> float:
        """Leases that were granted while nobody had to wait included."""
        return self._all.worst

    @property
    def shares(self) -> dict[str, float]:
        """Of useful service since _LEARNED."""
        served = {u: self.units.get(u, 0.0) - self.begun.get(u, 0.0) for u in self.quotas}
        return {u: s / sum(served.values()) for u, s in served.items()}


def units_of(cluster: Cluster) -> dict[str, float]:
    """Useful service of each user on all replicas."""
    units: dict[str, float] = {}
    for host in cluster.hosts.values():
        assert isinstance(host.machine, EngineMachine)
        assert host.machine.books is not None
        for user, served in host.machine.books.users.items():
            units[user] = units.get(user, 0.0) + served.units
    return units


def interleaved(*streams: list[Job]) -> list[Job]:
    """In turn: a common start."""
    return [job for jobs in zip(*streams, strict=True) for job in jobs]


def long_and_short(replicas: int, seconds: float) -> list[Job]:
    """Prompts of 1,000 against answers of 300."""
    make = Maker()
    number = round(40 * replicas * seconds)
    return interleaved(make("a", 1000, 30, n=number), make("b", 60, 300, n=number))


def slots_traffic(replicas: int, seconds: float) -> list[Job]:
    """4,000 in / 8 out against 16 in / 1,000 out."""
    make = Maker()
    number = round(8 * replicas * seconds)
    return interleaved(make("a", 4000, 8, n=2 * number), make("b", 16, 1000, n=2 * number))


def backlogged(
    quotas: dict[str, float], traffic: Traffic, *, replicas: int, sync: float, clients: int = 1, seconds: float = 20.0
) -> tuple[ClusterGaps, float]:
    """The gaps, and units of useful service a second and replica."""
    jobs = traffic(replicas, seconds)
    config = tiers(quotas, T0={"max_queued": 10**6, "max_queued_per_user": 10**6})
    dispatching = DispatcherConfig(recovery=0.0, canary_every=math.inf, qos=config, max_waiting=10**6)
    cluster = Cluster(
        dispatching,
        [SHAPE] * replicas,
        ordering=orderings_of(config, SHAPE, longest_of(jobs)),
        sync_every=sync,
        clients=clients,
    )
    gaps = ClusterGaps(quotas)
    cluster.each_tick.append(gaps)
    cluster.run(jobs, until=seconds)
    assert all(cluster.waiting[u] for u in quotas), "somebody ran out of work"
    return gaps, sum(gaps.units.values()) / cluster.now / replicas


def bound(replicas: int) -> float:
    """2 R (U + X) for quota 1."""
    return 2.0 * replicas * 2.0 * step_units(SHAPE)


def g6(*, quick: bool = False) -> Row:
    """Syncs from 50 ms to 1 s on four replicas; one against four; one to eight ingresses."""
    quotas = {"a": 2.0, "b": 1.0}
    _, alone = backlogged(quotas, long_and_short, replicas=1, sync=0.2)
    worst, slowest = 0.0, math.inf
    syncs, ingresses = (SYNCS[1:2], (1, 4)) if quick else (SYNCS, (1, 4, 8))
    for sync in syncs:
        gaps, speed = backlogged(quotas, long_and_short, replicas=4, sync=sync)
        worst = max(worst, gaps.worst / bound(4))
        slowest = min(slowest, speed / alone)
    shares = [
        backlogged(quotas, long_and_short, replicas=2, sync=0.2, clients=clients)[0].shares["a"]
        for clients in ingresses
    ]
    moved = max(shares) - min(shares)
    off = max(abs(share - 2 / 3) for share in shares)
    says = (
        f"gap as part of 2 R (U + X), R = 4, syncs of {syncs[0]:g} to {syncs[-1]:g} s; speed a replica {slowest:.3f} "
        f"of R = 1; shares move {100 * moved:.2f} points over 1 to {ingresses[-1]} ingresses, and are {100 * off:.2f} "
        "points off their quotas"
    )
    return Row(worst, 1.0, worst <= 1.0 and slowest >= 0.97 and moved <= 0.01, 1 + len(syncs) + len(ingresses), says)


def slots() -> Row:
    """R = 4, syncs of 50 and 200 ms. Everybody waits for slots, hence for evictions."""
    runs = [backlogged({"a": 1.0, "b": 1.0}, slots_traffic, replicas=4, sync=sync)[0] for sync in (0.05, 0.2)]
    worst, start = max(r.worst for r in runs), max(r.worst_from_start for r in runs)
    evicting = 4 * gap_bound(SHAPE, 4008)
    says = (
        f"gap as part of 2 R (U + X), R = 4, syncs of 50 and 200 ms; {worst / evicting:.2f} of 2 R (U + E + L); from "
        f"the very start {start / bound(4):.2f} of 2 R (U + X)"
    )
    return at_most(worst / bound(4), 1.0, says, 2)


def violations(planted: AbstractContextManager[object], *, ordered: bool) -> int:
    """What the dispatcher's own watch counts in 100 s of backlog, one user away for a while.

    Engines order their steps, or (not `ordered`) serve first come, first served.
    """
    make = Maker()
    jobs = interleaved(make("a", 500, 40, n=300), make("b", 100, 200, n=300)) + make("a", 500, 40, n=2500)
    jobs += make("b", 100, 200, n=900, at=60.0)
    config = tiers({"a": 1.0, "b": 3.0}, T0={"max_queued": 10**6, "max_queued_per_user": 10**6})
    dispatching = DispatcherConfig(recovery=0.0, canary_every=math.inf, qos=config, max_waiting=10**6)
    shape = replace(SHAPE, slots=4)
    found = 0

    def look(cluster: Cluster) -> None:
        nonlocal found
        found = max(found, sum(row.violations for row in cluster.dispatcher.tiers()))

    with planted:
        ordering = orderings_of(config, shape, longest_of(jobs)) if ordered else None
        cluster = Cluster(dispatching, [shape], ordering=ordering, context=round(longest_of(jobs)))
        cluster.each_tick.append(look)
        cluster.run(sorted(jobs, key=lambda j: (j.arrived, j.number)), until=100.0)
    return found


def _one_quota(standing: Standing, account: object) -> None:
    _take(standing, account)  # type: ignore[arg-type]
    standing.weight = 1.0


def _not_of_a(order: StepOrder, executed: int, charges: list[Charge], expected: dict[Standing, float] | None) -> None:
    _executed(order, executed, [c for c in charges if c.flow.account.id != "a"], expected)


_take, _executed = Standing._take, StepOrder.executed
DISPATCHER_DEFECTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "quotas ignored": lambda: mock.patch.object(Standing, "_take", _one_quota),
    "no lift": lambda: mock.patch.object(Policy, "_lift"),
}
ENGINE_DEFECTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "charges lost": lambda: mock.patch.object(StepOrder, "executed", _not_of_a),
    "quotas ignored": DISPATCHER_DEFECTS["quotas ignored"],
}


def g11() -> Row:
    """The live metric: silent where nothing is wrong, and not where a defect was planted."""
    sound = sum(violations(nullcontext(), ordered=ordered) for ordered in (False, True))
    seen = {name: violations(patch(), ordered=False) for name, patch in DISPATCHER_DEFECTS.items()}
    seen |= {f"ordered steps, {name}": violations(patch(), ordered=True) for name, patch in ENGINE_DEFECTS.items()}
    says = "violations counted live; with planted defects: " + ", ".join(f"{name} {n}" for name, n in seen.items())
    return Row(sound, 0, sound == 0 and all(seen.values()), 2 + len(seen), says)
