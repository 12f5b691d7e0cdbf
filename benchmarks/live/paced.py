"""A device of a known speed: what runs inside a rank so that each step takes what a cost model says.

Replicas that share the cores of one small machine have no speed of their own: it depends on what the others do. So a
rank computes its step as always, and then waits, idle, until the step has taken its time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from simulation.device import StepCost

from workers.engine.plan import Executor, StepHandle, StepPlan, StepResult

QUICK = StepCost(base=0.024, prefill=0.25e-3, row=0.2e-3, kv=0.0)  # the demo model mostly computes a step in less
_LATE = 1.25  # times its device's seconds


class PacedExecutor:
    """Steps of `inner` take at least what `cost` says; `late` of `steps` took a quarter more: the machine was slow."""

    def __init__(self, inner: Executor, cost: StepCost) -> None:
        self.inner, self.cost = inner, cost
        self.steps = self.late = 0
        self.free_at = 0.0  # when the device has done all that was submitted

    def submit(self, plan: StepPlan) -> PacedStep:
        """Start a step."""
        prefill = sum(run.count for run in plan.scheduled if run.count > 1)
        rows = sum(run.count == 1 for run in plan.scheduled)
        begins = max(time.monotonic(), self.free_at)
        self.free_at = begins + self.cost.seconds(prefill, rows, 0.0)
        return PacedStep(self, self.inner.submit(plan), begins, self.free_at)


@dataclass(slots=True)
class PacedStep:
    """A step under way, from `begins` to `ends`."""

    executor: PacedExecutor
    inner: StepHandle
    begins: float
    ends: float

    def result(self) -> StepResult:
        """Wait for it."""
        result = self.inner.result()
        time.sleep(max(self.ends - time.monotonic(), 0.0))
        seconds = time.monotonic() - self.begins
        self.executor.steps += 1
        self.executor.late += seconds > _LATE * (self.ends - self.begins)
        return replace(result, seconds=seconds)


def set_pace(actor: Any, cost: StepCost) -> None:
    """The rank `actor` has a device of that `cost` from its next step on."""

    def change() -> None:
        engine = actor._server._engine
        if isinstance(engine._executor, PacedExecutor):
            engine._executor.cost = cost
        else:
            engine._executor = PacedExecutor(engine._executor, cost)

    actor._server.between_steps(change)


def lateness(actor: Any) -> tuple[int, int]:
    """(steps since the rank has a pace, those that took a quarter longer than that)."""
    executor = actor._server._engine._executor
    return executor.steps, executor.late
