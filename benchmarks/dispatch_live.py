"""Which replica, on a running cluster: three replicas of speed 1:2:4, strategies in turns under the same arrivals.

    python benchmarks/dispatch_live.py [--rounds 3] [--seconds 12] [--json FILE]

The demo model over HTTP. Two of the ranks are stopped for three quarters and half of each 20 ms (`live/slower.py`); all
share one machine, so that the true ratio is measured first, one replica at a time. Arrivals are Poisson at `--load` of
what all can do; each round runs every strategy with the same requests. LMDeploy's formula is told the true speeds.

Time to first token is the client's. Predictions are those of the leases, from lease to first token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

import ray
from live.cluster import dispatcher, running, table, until
from live.figures import Figure, interval, median, show, single, write
from live.routing import LMDEPLOY, use_strategy
from live.site import Site
from load.records import percentile

from cluster.config import EngineSection
from router.dispatch.lease import ReplicaRow

SPEEDS = (1.0, 2.0, 4.0)
OURS = "min_expected_latency"
STRATEGIES = (OURS, LMDEPLOY, "round_robin", "power_of_two")
ENGINE = EngineSection(max_num_seqs=32, max_num_batched_tokens=256, prefix_caching=False)
LATE = 0.1  # seconds: predictions are judged from here on
GROUP = "TTFT"


@dataclass(frozen=True, slots=True)
class Job:
    """One request, `at` seconds from the start."""

    at: float
    prompt: list[int]
    tokens: int


@dataclass
class Seen:
    """Of one strategy: seconds to first tokens by round, and (predicted, actual) from lease to first token."""

    firsts: list[list[float]] = field(default_factory=list)
    predictions: list[tuple[float, float]] = field(default_factory=list)
    replicas: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def jobs(seed: int, rate: float, seconds: float) -> list[Job]:
    """Chat-like lengths; the same for the same seed."""
    rng, at, found = Random(seed), 0.0, []
    while at < seconds:
        prompt = [rng.randrange(300, 900) for _ in range(min(round(rng.lognormvariate(4.5, 0.8)) + 8, 600))]
        found.append(Job(at, prompt, min(round(rng.lognormvariate(3.0, 0.7)) + 4, 120)))
        at += rng.expovariate(rate)
    return found


async def play(work: Sequence[Job], send: Callable[[int, Job], Awaitable[float]]) -> list[float]:
    """Seconds to first tokens."""
    began = time.perf_counter()

    async def one(number: int, job: Job) -> float:
        await asyncio.sleep(max(began + job.at - time.perf_counter(), 0.0))
        return await send(number, job)

    return list(await asyncio.gather(*(one(n, job) for n, job in enumerate(work))))


class Contest:
    """The strategies on one cluster; `speeds` by replica."""

    def __init__(self, site: Site, speeds: Mapping[str, float]) -> None:
        self._site, self._speeds = site, speeds
        self.seen: dict[str, Seen] = defaultdict(Seen)

    async def round(self, strategy: str, work: Sequence[Job], name: str) -> None:
        """All of `work` by one strategy."""
        seen = self.seen[strategy]
        await asyncio.to_thread(switch, strategy, self._speeds)
        seen.firsts.append(await play(work, self._by_http(name)))
        for number in range(len(work)):
            self._learn(seen, (await self._site.call(f"/requests/{name}-{number}/explain")).json())
        await until(lambda rows: not any(r.load.running for r in rows.rows))

    def _by_http(self, name: str) -> Callable[[int, Job], Awaitable[float]]:
        async def send(number: int, job: Job) -> float:
            stream = await self._site.ask("u", job.prompt, job.tokens, [("x-request-id", f"{name}-{number}")])
            return stream.first

        return send

    @staticmethod
    def _learn(seen: Seen, story: dict[str, Any]) -> None:
        lease = story["leases"][0]
        granted, first = lease["granted"], lease["end"]["first_token_seconds"]
        seen.replicas[granted["replica"]] += 1
        if first and granted["predicted_first_token_seconds"]:
            seen.predictions.append((granted["predicted_first_token_seconds"], first))


def switch(strategy: str, speeds: Mapping[str, float]) -> None:
    """The dispatcher chooses by `strategy` from now on."""
    ray.get(dispatcher().__ray_call__.remote(use_strategy, strategy, speeds))


async def alone(site: Site, chosen: str) -> float:
    """Requests a second of the replica `chosen`, six at a time."""
    await asyncio.to_thread(switch, chosen, {})
    work, slots = jobs(1, 10.0, 2.4), asyncio.Semaphore(6)
    began = time.perf_counter()

    async def one(job: Job) -> None:
        async with slots:
            await site.ask("u", job.prompt, job.tokens)

    await asyncio.gather(*map(one, work))
    return len(work) / (time.perf_counter() - began)


async def contest(site: Site, rows: Sequence[ReplicaRow], given: argparse.Namespace) -> list[Figure]:
    """All rounds, and their figures."""
    names = [row.info.id for row in rows]
    speeds = {name: await alone(site, name) for name in names}
    figures = [single(f"speed of replica {i}", speeds[name], "requests/s") for i, name in enumerate(names)]
    rate = given.load * given.capacity * max(speeds.values())
    arena = Contest(site, speeds)
    for number in range(given.rounds):
        work = jobs(100 + number, rate, given.seconds)
        order = [*given.strategies]
        Random(number).shuffle(order)
        for strategy in order:
            await arena.round(strategy, work, f"{strategy}-{number}")
            print(f"{strategy}, round {number}: {len(work)} requests", flush=True)
    figures.append(single("arrivals", rate, "requests/s"))
    return figures + figures_of(arena.seen, names)


def figures_of(seen: Mapping[str, Seen], names: Sequence[str]) -> list[Figure]:
    """TTFT by strategy, p99s relative to ours by round, and the error of predictions."""
    figures = []
    for strategy, s in seen.items():
        whole = [1e3 * first for firsts in s.firsts for first in firsts]
        p99 = interval(whole, lambda values: percentile(values, 99))
        figures += [median(f"{strategy}: p50", whole, "ms"), Figure(f"{strategy}: p99", *p99, "ms")]
        if s.replicas:
            total = sum(s.replicas.values())
            shares = "/".join(f"{100 * s.replicas[name] / total:.0f}" for name in names)
            figures.append(single(f"{strategy}: requests, {shares} % by replica", total))
    ours = seen[OURS]
    for strategy, s in seen.items():
        if strategy != OURS:
            pairs = zip(ours.firsts, s.firsts, strict=True)
            ratios = [percentile(a, 99) / percentile(b, 99) for a, b in pairs]
            figures.append(median(f"{OURS}: p99 by that of {strategy}", ratios))
    late = [abs(p - a) / a for p, a in ours.predictions if a >= LATE]
    if late:
        figures.append(median("prediction, where the first token takes 100 ms: error", late, "", 0.3))
        signed = statistics.median(p / a for p, a in ours.predictions if a >= LATE)
        figures.append(single("the same: predicted by actual", signed))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals, for each strategy and round")
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument(
        "--capacity", type=float, default=1.2, help="of all three, by that of the quickest: they share two cores"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with running(qos=None, engine=ENGINE, replicas=len(SPEEDS)) as cluster:
        rows = table().rows
        slower = Path(__file__).parent / "live" / "slower.py"
        shares = [speed / max(SPEEDS) for speed in SPEEDS]
        slowing = [
            subprocess.Popen([sys.executable, str(slower), str(row.info.pid), str(share)])
            for row, share in zip(rows, shares, strict=True)
            if share < 1.0
        ]
        try:
            figures = asyncio.run(contest(Site(cluster.base_url), rows, given))
        finally:
            for process in slowing:
                process.terminate()
                process.wait()
    show(GROUP, figures)
    if given.json:
        write(given.json, {GROUP: figures})


if __name__ == "__main__":
    main()
