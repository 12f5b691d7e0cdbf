"""Which replica, on a running cluster: speeds 1:2:4, the quickest turns ten times slower half-way, strategies in turns.

    python benchmarks/dispatch_live.py [--rounds 8] [--first-round 0] [--seconds 16] [--rate 8] [--json FILE]

The demo model over HTTP. Each rank computes its steps and then waits until they have taken what a device of its speed
takes (`live/paced.py`): without that, replicas that share one machine have no speed of their own. How many steps the
machine computed too late for that is printed. Each round runs every strategy in an order of its own, with the same
Poisson arrivals; before it each replica serves a few requests, so that speeds are known again.

`ray_serve` is Ray Serve's default router: the same engines, called by a plain `DeploymentHandle` (`live/handles.py`).
The oracle knows what steps cost at each moment and how long each answer will be; LMDeploy's formula is told the speeds
at the start. Time to first token is the client's. Predictions are those of the leases, from lease to first token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
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
from live.figures import Figure, median, show, single, write
from live.handles import doors
from live.paced import QUICK, lateness, set_pace
from live.routing import LMDEPLOY, ORACLE, use_strategy
from live.site import Refused, Site
from load.records import percentile
from simulation.device import StepCost

from cluster.config import EngineSection
from router.dispatch.lease import ReplicaRow

SPEEDS = (1.0, 2.0, 4.0)
TURNS_SLOW = 2  # the index of the one that does: the quickest
SLOWER = 10.0
OURS = "min_expected_latency"
RAY_SERVE = "ray_serve"
STRATEGIES = (OURS, ORACLE, LMDEPLOY, "power_of_two", "round_robin", RAY_SERVE)
BOUNDS = {ORACLE: 1.15, LMDEPLOY: 0.7, "power_of_two": 0.7}  # of our p99 by theirs
ENGINE = EngineSection(max_num_seqs=32, max_num_batched_tokens=256, prefix_caching=False)
LATE = 0.1  # seconds: predictions are judged from here on
WARM_REQUESTS = 3  # of each replica, before a strategy's turn
GROUP = "TTFT"

Send = Callable[[int, "Job"], Awaitable[float]]


class Replaced(Exception):
    """A replica is another one by now, which has no pace: the machine stood still, and it was taken for dead."""


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


async def play(work: Sequence[Job], send: Send) -> list[float]:
    """Seconds to first tokens."""
    began = time.perf_counter()

    async def one(number: int, job: Job) -> float:
        await asyncio.sleep(max(began + job.at - time.perf_counter(), 0.0))
        return await send(number, job)

    return list(await asyncio.gather(*(one(n, job) for n, job in enumerate(work))))


class Contest:
    """The strategies on one cluster; `handle` is that of the doors."""

    def __init__(self, site: Site, rows: Sequence[ReplicaRow], handle: Any) -> None:
        self._site, self._handle = site, handle
        self.names = [row.info.id for row in rows]
        self._ranks = [ray.get_actor(**_named(f"rank-{name}-0")) for name in self.names]
        self._told = dict(zip(self.names, SPEEDS, strict=True))
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.pace(1.0)

    def costs(self, slower: float) -> dict[str, StepCost]:
        """By replica, when the one that turns slow is `slower` times as slow as it was."""
        times = [SPEEDS[-1] / speed * (slower if i == TURNS_SLOW else 1.0) for i, speed in enumerate(SPEEDS)]
        return {name: QUICK.slower(k) for name, k in zip(self.names, times, strict=True)}

    def pace(self, slower: float) -> None:
        """The ranks have these devices from now on."""
        costs = self.costs(slower)
        ray.get([r.__ray_call__.remote(set_pace, costs[n]) for n, r in zip(self.names, self._ranks, strict=True)])

    def use(self, strategy: str, slower: float = 1.0) -> None:
        """The dispatcher chooses by `strategy` from now on."""
        ray.get(dispatcher().__ray_call__.remote(use_strategy, strategy, self.costs(slower), self._told))

    def late(self) -> float:
        """The share of all steps for which the machine was not quick enough."""
        found = ray.get([r.__ray_call__.remote(lateness) for r in self._ranks])
        return sum(late for _, late in found) / sum(steps for steps, _ in found)

    async def round(self, strategy: str, work: Sequence[Job], name: str, seconds: float) -> None:
        """All of `work`, which arrives within `seconds`, by one strategy."""
        seen, by_http = self.seen[strategy], strategy != RAY_SERVE
        await self._warm()
        await asyncio.to_thread(self.use, strategy if by_http else OURS)
        turning = asyncio.create_task(self._turn_slow(strategy if by_http else OURS, seconds))
        firsts = await play(work, self._by_http(name) if by_http else self._by_handle(seen))
        await turning
        if {row.info.id for row in (await asyncio.to_thread(table)).rows} != set(self.names):
            raise Replaced
        seen.firsts.append(firsts)
        for number in range(len(work) if by_http else 0):
            _learn(seen, (await self._site.call(f"/requests/{name}-{number}/explain")).json())
        await until(lambda rows: not any(r.load.running for r in rows.rows))

    async def _turn_slow(self, strategy: str, seconds: float) -> None:
        """Half-way; when all has arrived it is quick again."""
        for slower in (SLOWER, 1.0):
            await asyncio.sleep(seconds / 2)
            await asyncio.gather(
                asyncio.to_thread(self.pace, slower), asyncio.to_thread(self.use, strategy, slower)
            )  # fmt: skip

    async def _warm(self) -> None:
        for name in self.names:
            await asyncio.to_thread(self.use, name)
            await asyncio.gather(*(self._site.ask("u", 100, 8) for _ in range(WARM_REQUESTS)))

    def _by_http(self, name: str) -> Send:
        async def send(number: int, job: Job) -> float:
            stream = await self._site.ask("u", job.prompt, job.tokens, [("x-request-id", f"{name}-{number}")])
            return stream.first

        return send

    def _by_handle(self, seen: Seen) -> Send:
        async def send(number: int, job: Job) -> float:
            began, first = time.perf_counter(), 0.0
            async for replica in self._handle.remote(job.prompt, job.tokens):
                if not first:
                    first = time.perf_counter() - began
                    seen.replicas[replica] += 1
            return first

        return send


def _learn(seen: Seen, story: dict[str, Any]) -> None:
    lease = story["leases"][0]
    granted, first = lease["granted"], lease["end"].get("first_token_seconds")  # none where the lease was lost
    seen.replicas[granted["replica"]] += 1
    if first and granted["predicted_first_token_seconds"]:
        seen.predictions.append((granted["predicted_first_token_seconds"], first))


def _named(name: str) -> dict[str, str]:
    return next(a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"] == name)


async def contest(arena: Contest, given: argparse.Namespace) -> list[Figure]:
    """All rounds, and their figures."""
    for number in range(given.first_round, given.first_round + given.rounds):
        work = jobs(100 + number, given.rate, given.seconds)
        order = [*given.strategies]
        Random(number).shuffle(order)
        for strategy in order:
            try:
                await arena.round(strategy, work, f"{strategy}-{number}", given.seconds)
            except (Replaced, Refused) as e:
                print(f"round {number}, {strategy}: {type(e).__name__} {e}; what came before counts", flush=True)
                return figures_of(arena.seen, arena.names)
            p99 = 1e3 * percentile(arena.seen[strategy].firsts[-1], 99)
            print(f"round {number}, {strategy}: {len(work)} requests, p99 {p99:.0f} ms", flush=True)
    late = await asyncio.to_thread(arena.late)
    return [
        single("steps that took a quarter longer than their device", 100 * late, "%"),
        *figures_of(arena.seen, arena.names),
    ]


def figures_of(seen: Mapping[str, Seen], names: Sequence[str]) -> list[Figure]:
    """TTFT by strategy, p99s relative to ours by round, and the error of predictions."""
    figures = []
    seen = {name: s for name, s in seen.items() if s.firsts}
    if OURS not in seen:
        raise RuntimeError(f"no round of {OURS} came to its end")
    for strategy, s in seen.items():
        whole = [1e3 * first for firsts in s.firsts for first in firsts]
        p99s = [1e3 * percentile(firsts, 99) for firsts in s.firsts]
        figures += [median(f"{strategy}: p50", whole, "ms"), median(f"{strategy}: p99 of a round", p99s, "ms")]
        total = sum(s.replicas.values())
        shares = "/".join(f"{100 * s.replicas[name] / total:.0f}" for name in names)
        figures.append(single(f"{strategy}: requests, {shares} % by replica", total))
    ours = seen[OURS]
    for strategy, s in seen.items():
        if strategy != OURS:
            pairs = zip(ours.firsts, s.firsts, strict=False)  # the last round may be cut short
            ratios = [percentile(a, 99) / percentile(b, 99) for a, b in pairs]
            figures.append(median(f"{OURS}: p99 by that of {strategy}", ratios, "", BOUNDS.get(strategy)))
    late = [(p, a) for p, a in ours.predictions if a >= LATE]
    errors = [abs(p - a) / a for p, a in late]
    figures.append(median("prediction, where the first token takes 100 ms: error", errors, "", 0.3))
    figures.append(single("the same: predicted by actual", statistics.median(p / a for p, a in late)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--first-round", type=int, default=0, help="its number: runs beside each other take others")
    parser.add_argument("--seconds", type=float, default=16.0, help="of arrivals, for each strategy and round")
    parser.add_argument("--rate", type=float, default=8.0, help="of arrivals, a second")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(qos=None, engine=ENGINE, replicas=len(SPEEDS)) as cluster,
    ):
        rows = table().rows
        with doors([row.info for row in rows], cluster.secret, Path(folder)) as handle:
            arena = Contest(Site(cluster.base_url), rows, handle)
            figures = asyncio.run(contest(arena, given))
    show(GROUP, figures)
    if given.json:
        write(given.json, {GROUP: figures})


if __name__ == "__main__":
    main()
