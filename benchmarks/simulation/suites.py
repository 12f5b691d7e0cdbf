"""The synthetic suites of VTC (Sheng et al., OSDI'24) and a skewed trace of 27 clients, on a replica like theirs.

Rates are requests a minute, as in the paper; the device is an A10G with a 7B model and a pool of 10,000 tokens. Each
runs under first come, first served, VTC's counters in the same engine, a limit on requests a minute, and `router.qos`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from router.qos.config import Account, QosConfig, Tier
from router.qos.ledger import Prices
from simulation.device import A10G
from simulation.jobs import Job, again
from simulation.orderings import limits_of, ordering_of
from simulation.replica import Bench, Shape
from simulation.traffic import merged, poisson
from simulation.watch import Gaps, Service, plain, units

SECONDS = 600.0
SHAPE = Shape(slots=64, budget=1024, pool=10_000, cost=A10G)
POLICIES = ("FCFS", "VTC", "rate limit", "ours")
PER_MINUTE = 5  # what the rate limit lets through of each client


@dataclass(frozen=True, slots=True)
class Suite:
    """Jobs of some clients with equal shares unless `quotas` says otherwise."""

    name: str
    quotas: dict[str, float]
    jobs: list[Job]
    says: str


@dataclass(frozen=True, slots=True)
class Result:
    """One suite under one policy. `gap` is of service / quota while both of a pair wait; service as VTC counts it, and
    for ours with what decodes read.
    """

    suite: str
    policy: str
    tokens: float  # a second, prompt and answer
    output: float  # answer tokens a second
    gap: float
    ttft: dict[str, float]  # mean seconds, by client
    light: float  # mean over the clients that ask least (a third of them)
    rejected: float
    rows: list[tuple[float, dict[str, float]]]


def steady(user: str, rate: float, prompt: int, output: int, *, start: float = 0.0, end: float = SECONDS) -> list[Job]:
    """Evenly spaced, `rate` a minute."""
    gap = 60.0 / rate
    return [Job(0, user, prompt, output, start + i * gap) for i in range(int((end - start) / gap))]


def on_off(user: str, rate: float, prompt: int, output: int, *, period: float = 60.0) -> list[Job]:
    """A minute on, a minute off."""
    jobs = []
    for start in range(0, int(SECONDS), int(2 * period)):
        jobs += steady(user, rate, prompt, output, start=float(start), end=start + period)
    return jobs


def rising(user: str, last: float, prompt: int, output: int) -> list[Job]:
    """From nothing to `last` a minute."""
    number = int(last / 60.0 * SECONDS / 2)
    return [Job(0, user, prompt, output, SECONDS * math.sqrt((i + 1) / number)) for i in range(number)]


def at_random(user: str, rate: float, prompt: int, output: int, seed: int) -> list[Job]:
    """A Poisson process."""
    return [Job(0, user, prompt, output, t) for t in poisson(random.Random(seed), rate / 60.0, SECONDS)]


def suites() -> list[Suite]:
    """All of them."""
    two = {"one": 1.0, "two": 1.0}
    third = SECONDS / 3
    shift = [
        on_off("one", 30, 256, 256),
        steady("one", 60, 256, 256, start=third, end=2 * third),
        steady("one", 150, 256, 256, start=2 * third),
    ]
    shift[0] = [j for j in shift[0] if j.arrived < third]
    return [
        Suite(
            "overload", two, merged(steady("one", 90, 256, 256), steady("two", 180, 256, 256)), "90 and 180 a minute"
        ),
        Suite(
            "proportional",
            {"one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0},
            merged(*(steady(u, 90, 256, 256) for u in ("one", "two", "three", "four"))),
            "quotas 1 to 4, all beyond their share",
        ),
        Suite(
            "on_off_less",
            two,
            merged(on_off("one", 30, 256, 256), steady("two", 120, 256, 256)),
            "one is on and off below its share, two beyond",
        ),
        Suite(
            "on_off_overload",
            two,
            merged(on_off("one", 120, 256, 256), steady("two", 180, 256, 256)),
            "one is on and off beyond its share, two beyond",
        ),
        Suite(
            "poisson_short_long",
            two,
            merged(at_random("one", 480, 64, 64, 1), at_random("two", 90, 512, 512, 2)),
            "many short against few long",
        ),
        Suite(
            "increase",
            two,
            merged(steady("one", 90, 256, 256), rising("two", 240, 256, 256)),
            "one steady, two asks more and more",
        ),
        Suite(
            "dist_shift",
            two,
            merged(*shift, steady("two", 90, 256, 256)),
            "one is below its share, then at it, then far beyond",
        ),
        clients_27(),
    ]


def clients_27(seed: int = 27) -> Suite:
    """Chat-like lengths (136 in, 256 out in the mean), 210 requests a minute, two clients with half of them."""
    rng = random.Random(seed)
    names = [f"c{i:02}" for i in range(27)]
    weights = [1.0 / (1 + i) ** 1.1 for i in range(27)]

    def length(mean: float) -> int:
        return min(max(int(rng.lognormvariate(math.log(mean) - 0.5, 1.0)), 2), 1000)

    jobs = [
        Job(0, rng.choices(names, weights)[0], length(136), length(256), t) for t in poisson(rng, 210 / 60.0, SECONDS)
    ]
    return Suite("27 clients", dict.fromkeys(names, 1.0), merged(jobs), "a skewed trace like the arena's")


class PerMinute:
    """At most so many requests of each client in any 60 seconds; the rest is refused."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[str, deque[float]] = {}

    def __call__(self, job: Job) -> bool:
        """Whether it may come."""
        seen = self._seen.setdefault(job.user, deque())
        while seen and seen[0] <= job.arrived - 60.0:
            seen.popleft()
        if len(seen) >= self._most:
            return False
        seen.append(job.arrived)
        return True


def run(suite: Suite, policy: str) -> Result:
    """One suite under one policy, for the length of its arrivals."""
    tier = Tier(0, "all")
    config = QosConfig((tier,), tuple(Account(tier, u, q) for u, q in suite.quotas.items()))
    jobs = again(suite.jobs)
    longest = max(j.prompt + 2 * j.output for j in jobs)
    ordering = None
    if policy == "VTC":
        prices = Prices(kv_read=0.0)
        ordering = ordering_of(config, limits_of(SHAPE, longest, pacing=math.inf, eviction=math.inf), prices)
    elif policy == "ours":
        ordering = ordering_of(config, limits_of(SHAPE, longest))
    bench = Bench(SHAPE, ordering)
    if policy == "rate limit":
        bench.at_arrival = PerMinute(PER_MINUTE)
    gaps, service = Gaps(suite.quotas, measure=units if policy == "ours" else plain), Service(5.0, measure=plain)
    bench.each_step += [gaps, service]
    bench.run(jobs, until=SECONDS)
    ttft = {
        u: _mean(j.ttft if j.first else SECONDS - j.arrived for j in jobs if j.user == u and not j.refused)
        for u in suite.quotas
    }
    count = {u: sum(j.user == u for j in jobs) for u in suite.quotas}
    light = sorted(suite.quotas, key=lambda u: count[u])[: max(len(count) // 3, 1)]
    served = bench.books.users.values()
    return Result(
        suite.name,
        policy,
        tokens=sum(s.prefill + s.decode for s in served) / bench.now,
        output=sum(j.emitted for j in jobs) / bench.now,
        gap=max(gaps.worst.values()),
        ttft=ttft,
        light=_mean(ttft[u] for u in light),
        rejected=sum(j.refused for j in jobs) / len(jobs),
        rows=service.rows,
    )


def _mean(values: Iterable[float]) -> float:
    seen = list(values)
    return sum(seen) / len(seen) if seen else math.nan
