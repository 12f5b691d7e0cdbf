"""What `benchmarks/dispatch_live.py` runs inside the dispatcher's process: strategies to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from simulation.dispatch import RequestsBySpeed

from router.dispatch.strategies import STRATEGIES, Strategy, make_strategy
from router.dispatch.table import Demand, Replica

LMDEPLOY = "lmdeploy"


class Only:
    """One replica takes all."""

    def __init__(self, replica_id: str) -> None:
        self._id = replica_id

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        return next((r for r in candidates if r.info.id == self._id), candidates[0])


def use_strategy(actor: Any, name: str, speeds: Mapping[str, float]) -> None:
    """The dispatcher `actor` chooses by `name` from now on: LMDeploy's formula, which is told the true `speeds`; one of
    ours; or the replica of that name alone.
    """
    made: Strategy
    if name == LMDEPLOY:
        made = RequestsBySpeed(dict(speeds))
    elif name in STRATEGIES:
        made = make_strategy(name, Random(0))
    else:
        made = Only(name)
    actor._server.dispatcher._granting._strategy = made
