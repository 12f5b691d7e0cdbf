"""The live contest of strategies: devices of a known speed, and the oracle that knows it.

Mutants seen to fail: a step that does not wait for the one before; an oracle without the step under way, or without the
prompts ahead.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from live import paced
from live.routing import Oracle
from simulation.device import StepCost

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.table import Demand
from workers.api.replica import LoadReport, ReplicaInfo
from workers.engine.plan import ScheduledSequence, StepPlan, StepResult

COST = StepCost(base=1.0, prefill=0.01, row=0.1, kv=0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0.0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(paced, "time", clock)
    return clock


def plan(number: int, *counts: int) -> StepPlan:
    return StepPlan(number, (), (), tuple(ScheduledSequence(slot, 0, n, 1) for slot, n in enumerate(counts)))


def executor(clock: Clock, computes: float) -> paced.PacedExecutor:
    """Of a machine that takes so many seconds for each step."""

    def submit(one: StepPlan) -> object:
        clock.now += computes
        return SimpleNamespace(result=lambda: StepResult(one.step, (), computes))

    return paced.PacedExecutor(SimpleNamespace(submit=submit), COST)  # type: ignore[arg-type]


def test_steps_take_what_their_device_takes_one_after_the_other(clock: Clock) -> None:
    device = executor(clock, 0.5)
    first, second = device.submit(plan(0, 1, 1, 100)), device.submit(plan(1, 1))
    assert first.result().seconds == pytest.approx(1.0 + 0.2 + 1.0)
    assert second.result().seconds == pytest.approx(1.1)
    assert clock.now == pytest.approx(100.0 + 2.2 + 1.1)
    assert (device.steps, device.late) == (2, 0)


def test_a_machine_that_is_too_slow_is_counted(clock: Clock) -> None:
    device = executor(clock, 3.0)
    assert device.submit(plan(0, 1)).result().seconds == pytest.approx(3.0)
    assert (device.steps, device.late) == (1, 1)


@pytest.mark.parametrize(
    ("quick", "best"),
    [
        (LoadReport(1), "quick"),
        (LoadReport(1, prefill_backlog=10_000), "slow"),
        (LoadReport(1, planned_prefill=10_000), "slow"),
    ],
)
def test_the_oracle_knows_costs_and_what_is_ahead(quick: LoadReport, best: str) -> None:
    d = Dispatcher(DispatcherConfig(), clock=lambda: 100.0, rng=random.Random(0))
    for name, load in (("slow", LoadReport(1)), ("quick", quick)):
        d.replica_up(ReplicaInfo(name, "m", "h", 1, 4096, 4, 100, 16, max_num_batched_tokens=256))
        d.load(name, load)
    oracle = Oracle({"slow": COST.slower(4.0), "quick": COST})
    chosen = oracle.choose(list(d._registry.replicas.values()), Demand(100, 10.0, 1, at=100.0))
    assert chosen.info.id == best
