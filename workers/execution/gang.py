"""Rank 0's executor when a replica has several ranks: every plan goes to all of them, and all run it."""

from __future__ import annotations

from workers.api.errors import EngineFault
from workers.engine.plan import Executor, StepHandle, StepMasks, StepPlan
from workers.parallel.channel import PlanReceiver, PlanSender


class GangExecutor:
    """Sends each plan to the other ranks and runs it here. Results are those of this rank: all ranks draw the same."""

    def __init__(self, own: Executor, sender: PlanSender) -> None:
        self._own, self._sender = own, sender

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start the step on all ranks. Raises EngineFault, naming the rank, when one is gone."""
        self._send(plan)
        return self._own.submit(plan)

    def draw(self, masks: StepMasks) -> None:
        """The step goes on on all ranks. Raises EngineFault, naming the rank, when one is gone."""
        self._send(masks)
        self._own.draw(masks)

    def _send(self, what: StepPlan | StepMasks) -> None:
        try:
            self._sender.send(what)
        except OSError as e:
            raise EngineFault(f"step {what.step}: {e}") from e


def follow(own: Executor, receiver: PlanReceiver) -> None:
    """Run what rank 0 plans, in order, until it is gone. Raises EngineFault when a step fails here.

    One step is launched ahead of the one that is waited for, as on rank 0.
    """
    under_way: StepHandle | None = None
    while (plan := receiver.receive()) is not None:
        if isinstance(plan, StepMasks):
            own.draw(plan)
            continue
        started = own.submit(plan)
        if under_way is not None:
            under_way.result()
        under_way = started
    if under_way is not None:
        under_way.result()
