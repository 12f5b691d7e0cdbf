"""What the front asks the cluster about its health; `cluster` answers, tests use fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.api.replica import LoadReport


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica, for /health and /metrics."""

    id: str
    model: str
    state: str  # ready | suspect | draining
    load: LoadReport | None = None


class Status(Protocol):
    """Health that means progress. All answers are immediate: they come from what is known, nobody is asked."""

    def live(self) -> bool:
        """Whether this process serves."""

    def ready(self) -> bool:
        """Whether some replica takes requests."""

    def healthy(self) -> bool:
        """Whether a step completed, or a canary token was made, within the last seconds."""

    def replicas(self) -> Sequence[ReplicaRow]:
        """All replicas known."""
