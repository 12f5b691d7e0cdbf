"""The simulated replicas: against each other, and against the books of the engine they run.

Mutants seen to fail: `BatchMachine` that admits before decodes end; a device that forgets what was reached.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from simulation import scale
from simulation.batch_machine import BatchMachine
from simulation.cluster import Cluster
from simulation.jobs import Job, Maker, quantile
from simulation.replica import Bench, Shape
from simulation.traffic import chats

from router.dispatch.dispatcher import DispatcherConfig

SHAPE = Shape(slots=16, pool=100_000, step_ahead=False)
CONFIG = DispatcherConfig(recovery=0.0, canary_every=math.inf)


@pytest.mark.parametrize("replicas", [1, 3])
def test_counted_batches_take_the_time_of_the_shipped_engine(replicas: int) -> None:
    def ran(make: type[BatchMachine] | None) -> list[Job]:
        jobs = list(chats(3, 20.0 * replicas, number=30))
        Cluster(CONFIG, [SHAPE] * replicas, seed=1, make=make).run(jobs)
        return jobs

    for ours, theirs in zip(ran(BatchMachine), ran(None), strict=True):
        assert (ours.replica, ours.first, ours.ended) == (theirs.replica, theirs.first, theirs.ended)


def test_one_seed_one_digest() -> None:
    first, second, other = (scale.run(replicas=3, requests=80, seed=seed) for seed in (1, 1, 2))
    assert first.digest == second.digest != other.digest
    assert (first.requests, first.refused) == (80, 0)


def test_books_from_plans_are_the_engines() -> None:
    make = Maker()
    jobs = make("a", 600, 40, n=12, every=0.05)
    for at in (0.0, 1.0):
        jobs += make("b", 90, 300, n=9, at=at, prefix=1, prefix_tokens=64)
    bench = Bench(replace(SHAPE, pool=3_000, prefix_caching=True, step_ahead=True))
    bench.run(jobs, steps=60)
    bench.cancel(jobs[3])
    bench.run([])
    stats, books = bench.replica.engine.stats, bench.books
    assert stats.preemptions > 0
    assert sum(j.cached for j in jobs) > 0
    assert (stats.executed, stats.overhead) == (books.executed, books.overhead)
    assert stats.prefill == sum(s.prefill for s in books.users.values())
    assert stats.decode == sum(s.decode for s in books.users.values())
    assert [j.number for j in jobs if not j.done] == [3]


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([4.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.75) == 1.75
    assert math.isnan(quantile([], 0.5))
