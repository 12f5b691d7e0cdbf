"""Streams of requests: arrival processes, and lengths like chats'."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, count

import workloads

from simulation.jobs import Job


def poisson(rng: random.Random, rate: float, seconds: float, *, start: float = 0.0) -> Iterator[float]:
    """Arrival times at `rate` a second."""
    now = start
    while (now := now + rng.expovariate(rate)) < start + seconds:
        yield now


@cache
def chat_lengths() -> list[tuple[int, int]]:
    """The 1,000 pairs (prompt, answer) of workload W3."""
    return workloads.w3_lengths()


def chats(seed: int, rate: float, *, number: int, users: int = 100, tiers: tuple[str, ...] = ()) -> Iterator[Job]:
    """`number` requests with W3's lengths, drawn anew, made as they are asked for; few users ask often, many seldom."""
    rng = random.Random(seed)
    lengths = chat_lengths()
    weights = [1.0 / (1 + i) ** 0.5 for i in range(users)]
    cumulated = list(accumulate(weights))
    names = [f"u{i}" for i in range(users)]
    now = 0.0
    for i in range(number):
        now += rng.expovariate(rate)
        prompt, output = rng.choice(lengths)
        user = bisect(cumulated, rng.random() * cumulated[-1], 0, users - 1)
        yield Job(i, names[user], prompt, output, now, tier=tiers[user % len(tiers)] if tiers else "")


def merged(*streams: list[Job]) -> list[Job]:
    """By arrival, with numbers in that order."""
    jobs = sorted((job for stream in streams for job in stream), key=lambda j: (j.arrived, j.number))
    for number, job in zip(count(), jobs):
        job.number = number
    return jobs
