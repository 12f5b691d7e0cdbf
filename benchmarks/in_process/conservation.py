"""G4: what quotas cost in speed, on this device.

A finite trace of six users of one tier with quotas 1 to 50, mixed lengths, all there at the start, once by quotas and
once first come, first served, in interleaved pairs: each pair has a trace of its own. First with all of the cache, then
with three times the longest request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from live.figures import Figure, median, single
from simulation.jobs import Job, again

from in_process.feed import Fed, Plant, soundness
from router.qos.config import Account, QosConfig, Tier

QUOTAS = {"a": 50.0, "b": 25.0, "c": 12.0, "d": 8.0, "e": 4.0, "f": 1.0}
LENGTHS = ((100, 60), (400, 40), (1500, 16), (60, 120))  # (prompt, answer) in tokens: the middle of each kind
SPREAD = (0.5, 1.5)  # of that
SMALL_POOL = 3  # times the longest request
SMALL_PART = 0.4  # of the requests: fewer run at once in it


def trace(seed: int, requests: int, *, divide: int = 1) -> list[Job]:
    """All lengths divided by `divide`."""
    rng = random.Random(seed)
    jobs = []
    for number in range(requests):
        prompt, answer = (max(1, int(n * rng.uniform(*SPREAD) / divide)) for n in rng.choice(LENGTHS))
        jobs.append(Job(number, "abcdef"[number % 6], prompt, answer))
    return jobs


def quotas() -> QosConfig:
    """One tier."""
    tier = Tier(0, "T")
    return QosConfig((tier,), tuple(Account(tier, user, quota) for user, quota in QUOTAS.items()))


def warm_up(plant: Plant, divide: int, requests: int = 40) -> None:
    """What is compiled or allocated at first use."""
    plant.run(quotas(), trace(-1, requests, divide=divide))


def measure(plant: Plant, *, pairs: int, requests: int, divide: int, block: int) -> Iterator[list[Figure]]:
    """Figures as they come, by pool. `block`: tokens of one."""
    longest = int(max(prompt + answer for prompt, answer in LENGTHS) * SPREAD[1] / divide)
    small = -(-SMALL_POOL * longest // block)
    yield _pairs(plant, "all of the cache", None, pairs, requests, divide)
    yield _pairs(plant, f"a cache of {small * block} tokens", small, pairs, int(SMALL_PART * requests), divide)


def _pairs(plant: Plant, name: str, blocks: int | None, pairs: int, requests: int, divide: int) -> list[Figure]:
    ours: list[Fed] = []
    theirs: list[Fed] = []
    for number in range(pairs):
        jobs = trace(number, requests, divide=divide)
        sides = [(quotas(), ours), (None, theirs)]
        for config, runs in sides if number % 2 else reversed(sides):
            runs.append(plant.run(config, again(jobs), blocks=blocks))
    speeds = [base.seconds / fed.seconds for base, fed in zip(theirs, ours, strict=True)]
    most = 2.0 if blocks is None else None  # the cache has at least four times the longest request
    return [
        median(f"{name}: speed, of first come, first served", speeds, "", 0.97, most=False),
        median(f"{name}: seconds by quotas", [fed.seconds for fed in ours], "s"),
        single(
            f"{name}: busy time that ran tokens again, at most", 100 * max(fed.recomputed for fed in ours), "%", most
        ),
        single(f"{name}: preemptions", sum(fed.preemptions for fed in ours)),
        *soundness(name, ours),
    ]
