"""G1: what a flood of the tier below costs the tier above.

In pairs: some requests of the upper tier alone, then beside `crowd` endless ones of the lower. The first token may be
later by (1 + p) T_max + k tau: T_max is the longest step while the flood runs, k the steps that the prompt takes, p = 1
since steps are planned one ahead, tau what the policy lets lower tiers add to a step as long as the gap between tokens
measured alone. The gap between tokens may be 1.3 times that of the tier alone, or 25 ms.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from load.records import percentile

from live.cluster import SMALL, running, write_tiers
from live.figures import Figure, interval, median, single
from live.site import Site, Stream, beside
from live.steps import StepWatch
from router.qos.config import QosConfig, Tier

TIERS = {"Platinum": {"vip": 100.0}, "Bronze": {"crowd": 100.0}}
ITL_TARGET = 0.025  # seconds
PROMPT, OUTPUT = 60, 24  # tokens of the upper tier's
STREAMS = 8  # of it, one after the other, for each half of a pair
AHEAD = 1  # p
WARM_SECONDS = 3.0


@dataclass
class Half:
    """All that was measured alone, or beside the flood. Seconds; a list a pair."""

    firsts: list[list[float]] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)  # step

    def add(self, streams: list[Stream], longest: float) -> None:
        """A half of a pair."""
        self.firsts.append([s.first for s in streams])
        self.gaps.append([gap for s in streams for gap in s.gaps])
        self.longest.append(longest)


async def pairs_of(site: Site, secret: str, pairs: int, crowd: int) -> tuple[Half, Half]:
    """(alone, beside the flood)."""
    alone, beside_flood = Half(), Half()
    async with StepWatch(secret) as watch:

        async def vip(half: Half) -> None:
            began = time.perf_counter()
            streams = [await site.ask("vip", PROMPT, OUTPUT) for _ in range(STREAMS)]
            half.add(streams, watch.longest(began, time.perf_counter()))

        await vip(Half())
        for _ in range(pairs):
            await vip(alone)
            async with beside([site.forever("crowd", 100 + 10 * (i % 20), 30 + 20 * (i % 10)) for i in range(crowd)]):
                await asyncio.sleep(WARM_SECONDS)
                await vip(beside_flood)
            await asyncio.sleep(0.5)
    return alone, beside_flood


def figures_of(alone: Half, flood: Half) -> list[Figure]:
    """The bounds are those of each pair: what is beyond them is the figure, which may be 0."""
    steps = -(-PROMPT // SMALL.max_num_batched_tokens)
    step = statistics.median(gap for gaps in alone.gaps for gap in gaps)
    config = QosConfig((Tier(0, "Platinum", itl_target=ITL_TARGET),), ())
    tau = min(config.tau, config.tiers[0].spare(step))

    def p99(values: list[float]) -> float:
        return percentile(values, 99)

    later, late_by, gaps_over = [], [], []
    for i, longest in enumerate(flood.longest):
        later.append(p99(flood.firsts[i]) - p99(alone.firsts[i]))
        late_by.append(later[-1] - (1 + AHEAD) * longest - steps * tau)
        gaps_over.append(p99(flood.gaps[i]) - max(1.3 * p99(alone.gaps[i]), ITL_TARGET))

    def pooled(name: str, each: list[list[float]], most: float | None = None) -> list[Figure]:
        whole = [1e3 * value for values in each for value in values]
        p99_of = interval(whole, lambda values: percentile(values, 99))
        return [median(f"{name}: median", whole, "ms", most), Figure(f"{name}: p99", *p99_of, "ms")]

    return [
        *pooled("first token, alone", alone.firsts),
        *pooled("first token, beside the flood", flood.firsts),
        *pooled("between tokens, alone", alone.gaps),
        *pooled("between tokens, beside the flood", flood.gaps, 1e3 * max(1.3 * step, ITL_TARGET)),
        median("longest step, alone", [1e3 * s for s in alone.longest], "ms"),
        median("T_max, longest step beside the flood", [1e3 * s for s in flood.longest], "ms"),
        single("tau", 1e3 * tau, "ms"),
        single("k, steps of the prompt", steps),
        median("first token later by (p99 of a pair)", [1e3 * s for s in later], "ms"),
        median("beyond its bound by", [1e3 * s for s in late_by], "ms", 0.0),
        median("between tokens: p99 beyond max(1.3 x alone, 25 ms) by", [1e3 * s for s in gaps_over], "ms", 0.0),
    ]


def measure(pairs: int, crowd: int) -> list[Figure]:
    """One replica of eight slots."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_tiers(Path(folder) / "qos.json", TIERS, Platinum={"itl_target": ITL_TARGET})
        with running(qos=file) as cluster:
            site = Site(cluster.base_url)
            return figures_of(*asyncio.run(pairs_of(site, cluster.secret, pairs, crowd)))
