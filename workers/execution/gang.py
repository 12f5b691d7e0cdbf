"""Rank 0's executor when a replica has several ranks: every plan goes to all of them, and all run it."""

from __future__ import annotations

from workers.api.errors import EngineFault
from workers.engine.plan import Executor, StepHandle, StepPlan
from workers.parallel.channel import PlanReceiver, PlanSender


class GangExecutor:
    """Sends each plan to the other ranks and runs it here. Results are those of this rank: all ranks draw the same."""

    def __init__(self, own: Executor, sender: PlanSender) -> None:
        self._own, self._sender = own, sender

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start the step on all ranks. Raises EngineFault, naming the rank, when one is gone."""
        try:
            self._sender.send(plan)
        except OSError as e:
            raise EngineFault(f"step {plan.step}: {e}") from e
        return self._own.submit(plan)


def follow(own: Executor, receiver: PlanReceiver) -> None:
    """Run what rank 0 plans, in order, until it is gone. Raises EngineFault when a step fails here.

    One step is launched ahead of the one that is waited for, as on rank 0.
    """
    under_way: StepHandle | None = None
    while (plan := receiver.receive()) is not None:
        started = own.submit(plan)
        if under_way is not None:
            under_way.result()
        under_way = started
    if under_way is not None:
        under_way.result()
