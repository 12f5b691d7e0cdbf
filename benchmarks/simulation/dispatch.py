"""Which replica: the shipped dispatcher and engines on replicas of speed 1:2:4, one of which turns ten times slower.

The oracle has the shipped formula with the true speeds of the moment, the true backlog and the true length of each
answer. LMDeploy's formula is `requests that run / speed` with typed-in speeds, the new request left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.strategies import STRATEGIES, Strategy
from router.dispatch.table import Demand, Replica
from simulation.cluster import Cluster, EngineMachine
from simulation.device import StepCost
from simulation.jobs import Maker, quantile
from simulation.replica import Shape
from simulation.traffic import chats, poisson

SPEEDS = (1.0, 2.0, 4.0)
TURNS_SLOW = 2  # the index of the one that does: the quickest
SLOWER = 10.0
RATE, SECONDS = 40.0, 80.0
_LEARNED = 5.0  # seconds from the start, before speeds are known, that count for nobody


@dataclass(frozen=True, slots=True)
class Run:
    """One strategy on one seed; seconds."""

    strategy: str
    ttft: list[float]
    errors: list[float]  # of the predicted first token, as parts of the actual one
    shares: dict[str, float]  # of the requests, by replica
    refused: int = 0

    @property
    def p99(self) -> float:
        """Time to first token."""
        return quantile(self.ttft, 0.99)

    @property
    def median(self) -> float:
        """Time to first token."""
        return quantile(self.ttft, 0.5)

    @property
    def error(self) -> float:
        """The median."""
        return quantile(self.errors, 0.5)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the seeds."""
    n = len(runs)
    return {
        "p50": sum(r.median for r in runs) / n,
        "p99": sum(r.p99 for r in runs) / n,
        "error": sum(r.error for r in runs) / n,
        "shares": [sum(r.shares.get(f"r{i}", 0.0) for r in runs) / n for i in range(len(SPEEDS))],
        "refused": sum(r.refused for r in runs),
    }


class Oracle:
    """The least latency by the true speeds, backlog and length."""

    def __init__(self, cluster: list[Cluster], next_output: list[int]) -> None:
        self._cluster, self._output = cluster, next_output

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""

        def seconds(r: Replica) -> float:
            machine = self._cluster[0].hosts[r.info.id].machine
            assert isinstance(machine, EngineMachine)
            cost, roster = machine.device.cost, machine.engine.roster
            rows, kv = len(roster.live) + 1, roster.residents.kv_tokens + demand.prefill
            first = (roster.backlog + demand.prefill) * cost.prefill + cost.base
            return first + self._output[0] * cost.seconds(0, rows, kv)

        return min(candidates, key=seconds)


class RequestsBySpeed:
    """LMDeploy's `min_expected_latency`, with the comparison the right way round."""

    def __init__(self, speeds: dict[str, float]) -> None:
        self._speeds = speeds

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        return min(candidates, key=lambda r: len(r.leases) / self._speeds[r.info.id])


class Affinity:
    """Whoever was sent this prefix first gets all that has it: the routing that spirals."""

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        return min(candidates, key=lambda r: r.index)


def shapes(slots: int = 256) -> list[Shape]:
    """Replicas of the three speeds; the quickest is an H100."""
    return [Shape(slots=slots, pool=400_000, cost=StepCost().slower(SPEEDS[-1] / s)) for s in SPEEDS]


def run(strategy: str, seed: int, *, rate: float = RATE, seconds: float = SECONDS, slow: bool = True) -> Run:
    """Requests with W3's lengths at `rate` a second; half-way the quickest replica turns slow."""
    holder: list[Cluster] = []
    output = [0]
    extra: dict[str, Callable[[Random], Strategy]] = {
        "oracle": lambda rng: Oracle(holder, output),
        "lmdeploy": lambda rng: RequestsBySpeed({f"r{i}": s for i, s in enumerate(SPEEDS)}),
    }
    jobs = list(chats(seed, rate, number=round(rate * seconds)))
    STRATEGIES.update(extra)
    try:
        config = DispatcherConfig(strategy=strategy, recovery=0.0, canary_every=math.inf)
        cluster = Cluster(config, shapes(), seed=seed)
    finally:
        for name in extra:
            del STRATEGIES[name]
    holder.append(cluster)
    cluster.before_arrival = lambda job: output.__setitem__(0, job.output)
    cluster.on_grant = lambda job, granted: setattr(job, "predicted", granted.first_seconds)
    if slow:
        machine = cluster.hosts[f"r{TURNS_SLOW}"].machine
        assert isinstance(machine, EngineMachine)
        device = machine.device
        cluster.at(seconds / 2, lambda: setattr(device, "cost", device.cost.slower(SLOWER)))
    cluster.run(jobs)
    counted = [j for j in jobs if j.arrived >= _LEARNED]
    known = [j for j in counted if j.first is not None and not math.isnan(j.predicted)]
    errors = [
        abs(j.predicted - (j.first or 0.0) + (j.granted or 0.0)) / ((j.first or 0.0) - (j.granted or 0.0))
        for j in known
    ]
    taken = Counter(j.replica for j in counted)
    return Run(
        strategy,
        [j.ttft for j in counted if not j.refused],
        errors,
        {name: n / len(counted) for name, n in sorted(taken.items())},
        sum(j.refused for j in counted),
    )


def spiral(strategy: str, seed: int, *, replicas: int = 3, rate: float = 80.0, seconds: float = 8.0) -> Run:
    """Every request begins with the same 1,024 tokens, and one replica alone cannot serve them."""
    extra: dict[str, Callable[[Random], Strategy]] = {"affinity": lambda rng: Affinity()}
    rng = Random(seed)
    make = Maker()
    jobs = [
        make("u", 1024 + rng.randint(20, 200), rng.randint(50, 200), at=at, prefix=1, prefix_tokens=1024)[0]
        for at in poisson(rng, rate, seconds)
    ]
    shape = Shape(slots=256, pool=400_000, prefix_caching=True)
    STRATEGIES.update(extra)
    try:
        config = DispatcherConfig(strategy=strategy, recovery=0.0, canary_every=math.inf)
        cluster = Cluster(config, [shape] * replicas, seed=seed, hash_prompts=True)
    finally:
        for name in extra:
            del STRATEGIES[name]
    cluster.run(jobs)
    taken = Counter(j.replica for j in jobs)
    return Run(strategy, [j.ttft for j in jobs], [], {n: c / len(jobs) for n, c in sorted(taken.items())})
