"""What the front asks the cluster about its health; `cluster` answers, tests use fakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.dispatch.lease import TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from workers.api.replica import LoadReport


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica, for /health and /metrics."""

    id: str
    model: str
    state: str  # ready | suspect | draining
    load: LoadReport | None = None
    since_step: float = math.inf  # seconds since it completed a step or a canary; infinite if it never did


class Status(Protocol):
    """Health that means progress. All answers are immediate: they come from what is known, nobody is asked."""

    def live(self) -> bool:
        """Whether this process serves."""

    def ready(self) -> bool:
        """Whether some replica takes requests."""

    def healthy(self) -> bool:
        """Whether of each model a ready replica completed a step, or made a canary token, within the last seconds."""

    def replicas(self) -> Sequence[ReplicaRow]:
        """All replicas known."""

    def waiting(self) -> Mapping[str, int]:
        """Requests without a lease, by model."""

    def tiers(self) -> Sequence[TierRow]:
        """Every tier of every model's queue; none where there are no tiers."""

    def work(self) -> Sequence[WorkRow]:
        """What was executed, and for which tier; none where there are no tiers."""

    def sessions(self) -> SessionCounts:
        """What is kept of interactive sessions."""
