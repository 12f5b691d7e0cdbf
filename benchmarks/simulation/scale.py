"""A thousand replicas, a million requests: the shipped dispatcher decides each lease; replicas are `BatchMachine`s."""

from __future__ import annotations

import hashlib
import math
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.dispatch.dispatcher import DispatcherConfig
from router.qos.config import Account, QosConfig, Tier
from simulation.batch_machine import BatchMachine
from simulation.cluster import Cluster
from simulation.jobs import Job, quantile
from simulation.replica import Shape
from simulation.traffic import chat_lengths, chats

TIERS = ("Platinum", "Gold", "Silver", "Bronze")
_KEEP = 97  # one time to first token in so many is kept for the quantiles


@dataclass(frozen=True, slots=True)
class Scale:
    """What a run came to. `digest` is over every request: its replica, and when it was granted, began and ended."""

    requests: int
    refused: int
    replicas_used: int
    wall: float
    cpu: float
    peak_mib: float
    virtual: float
    steps: int
    most_waiting: int
    ttft_median: float
    ttft_p99: float
    digest: str


def tiers() -> QosConfig:
    """Four tiers, the users of each under one line."""
    ranks = tuple(Tier(i, name, max_queued=10**6, max_queued_per_user=10**6) for i, name in enumerate(TIERS))
    return QosConfig(ranks, tuple(Account(t, "default", 1.0) for t in ranks))


def rate_of(shape: Shape) -> float:
    """Requests a second with W3's lengths that one replica can do, its slots full."""
    lengths = chat_lengths()
    prompt = sum(p for p, _ in lengths) / len(lengths)
    output = sum(o for _, o in lengths) / len(lengths)
    rows, cost = shape.slots, shape.cost
    per_row = cost.seconds(0, rows, rows * (prompt + output)) / rows
    return 1.0 / (prompt * cost.prefill + output * per_row)


def run(
    *,
    replicas: int,
    requests: int,
    seed: int,
    load: float = 0.7,
    shape: Shape | None = None,
    progress: Callable[[int], None] = lambda ended: None,
) -> Scale:
    """`load` is the part of what all replicas can do at most."""
    shape = shape or Shape(slots=256, pool=400_000)
    config = DispatcherConfig(recovery=0.0, canary_every=math.inf, qos=tiers(), max_waiting=10**6)
    began, cpu = time.perf_counter(), time.process_time()
    cluster = Cluster(config, [shape] * replicas, seed=seed, make=BatchMachine)
    digest, ttfts, used = hashlib.sha256(), [], set()
    counts = [0, 0]

    def ended(job: Job) -> None:
        index = int(job.replica[1:]) if job.replica else -1
        row = (job.number, index, job.granted or -1.0, job.first or -1.0, job.ended or -1.0)
        digest.update(struct.pack("<qqddd", *row))
        counts[0] += 1
        counts[1] += job.refused
        if not job.refused:
            used.add(index)
            if job.number % _KEEP == 0:
                ttfts.append(job.ttft)
        progress(counts[0])

    cluster.on_end = ended
    rate = load * replicas * rate_of(shape)
    cluster.run(chats(seed, rate, number=requests, users=1000, tiers=TIERS))
    assert counts[0] == requests, f"{counts[0]} of {requests} ended"
    return Scale(
        requests=requests,
        refused=counts[1],
        replicas_used=len(used),
        wall=time.perf_counter() - began,
        cpu=time.process_time() - cpu,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        virtual=cluster.now,
        steps=cluster.steps,
        most_waiting=cluster.most_waiting,
        ttft_median=quantile(ttfts, 0.5),
        ttft_p99=quantile(ttfts, 0.99),
        digest=digest.hexdigest(),
    )
