"""What `benchmarks/dispatch_live.py` runs inside the dispatcher's process: strategies to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from simulation.device import StepCost
from simulation.dispatch import RequestsBySpeed

from router.dispatch.strategies import STRATEGIES, Strategy, make_strategy
from router.dispatch.table import Demand, Replica

LMDEPLOY = "lmdeploy"
ORACLE = "oracle"


class Only:
    """One replica takes all."""

    def __init__(self, replica_id: str) -> None:
        self._id = replica_id

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        return next((r for r in candidates if r.info.id == self._id), candidates[0])


class Oracle:
    """The least latency by what steps cost at the moment, the step under way, the backlog and the true length.

    `demand.output` is the true one. Of the backlog it knows what the dispatcher does: the last report and later leases.
    """

    def __init__(self, costs: Mapping[str, StepCost]) -> None:
        self._costs = costs

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""

        def seconds(r: Replica) -> float:
            cost, load = self._costs[r.info.id], r.load
            under_way = 0.0
            if load.planned_prefill or load.planned_decode:
                ends = r.reported_at + cost.seconds(load.planned_prefill, load.planned_decode, 0.0)
                under_way = max(ends - demand.at, 0.0)
            tokens = load.prefill_backlog + r.unreported_tokens + demand.prefill
            step = cost.seconds(0.0, max(load.running, r.slots) + 1.0, 0.0)
            chunks = -(-tokens // r.info.max_num_batched_tokens)
            return under_way + tokens * cost.prefill + (chunks + demand.output - 1.0) * step

        return min((r for r in candidates if r.info.id in self._costs), key=seconds, default=candidates[0])


def use_strategy(actor: Any, name: str, costs: Mapping[str, StepCost], told: Mapping[str, float]) -> None:
    """The dispatcher `actor` chooses by `name` from now on: the oracle, which knows the `costs` of the moment and each
    answer's length; LMDeploy's formula, which was `told` speeds; one of ours; or the replica of that name alone.
    """
    granting = actor._server.dispatcher._granting
    expectations = granting._expectations
    vars(expectations).pop("output", None)
    made: Strategy
    if name == ORACLE:
        made = Oracle(costs)
        expectations.output = lambda request: float(request.max_tokens)
    elif name == LMDEPLOY:
        made = RequestsBySpeed(dict(told))
    elif name in STRATEGIES:
        made = make_strategy(name, Random(0))
    else:
        made = Only(name)
    granting._strategy = made
