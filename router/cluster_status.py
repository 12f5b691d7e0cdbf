"""`router.http.status.Status` of a front: from the dispatcher's last table, without asking anybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import ReplicaState, TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from router.http.status import ReplicaRow

HEALTHY_SECONDS = 6.0  # a canary every 2 s, 3 s of patience for it, and the table's own age
HEALTHY_STEPS = 10.0  # or so many predicted steps, where that is longer


class ClusterStatus:
    """A table that has grown old is believed less and less: without a dispatcher, health ends some seconds later.

    `models`: names of those that should have replicas.
    """

    def __init__(
        self, dispatcher: DispatcherClient, clock: Callable[[], float] = monotonic, *, models: Sequence[str] = ()
    ) -> None:
        self._dispatcher, self._clock, self._models = dispatcher, clock, frozenset(models)

    def live(self) -> bool:
        """Whoever can ask is served by this process."""
        return True

    def ready(self) -> bool:
        """Whether a replica takes leases and the dispatcher can grant them."""
        return self._dispatcher.connected and any(r.state is ReplicaState.READY for r in self._dispatcher.rows)

    def healthy(self) -> bool:
        """Whether of each model a replica that takes leases has stepped of late, for a canary at least."""
        age = self._clock() - self._dispatcher.table_at
        well = {
            r.info.model
            for r in self._dispatcher.rows
            if r.state is ReplicaState.READY
            and r.since_step + age <= max(HEALTHY_SECONDS, HEALTHY_STEPS * r.step_seconds)
        }
        return bool(well) and well >= self._models

    def replicas(self) -> Sequence[ReplicaRow]:
        """All replicas known."""
        table, age = self._dispatcher.table, self._clock() - self._dispatcher.table_at
        return [
            ReplicaRow(r.info.id, r.info.model, r.state.value, None if r.info.url else r.load, r.since_step + age)
            for r in table.rows
        ]

    def waiting(self) -> Mapping[str, int]:
        """Requests without a lease, by model."""
        return dict(self._dispatcher.table.waiting_by_model)

    def tiers(self) -> Sequence[TierRow]:
        """As the dispatcher last said."""
        return self._dispatcher.table.tiers

    def work(self) -> Sequence[WorkRow]:
        """As the dispatcher last said."""
        return self._dispatcher.table.work

    def sessions(self) -> SessionCounts:
        """As the dispatcher last said."""
        return self._dispatcher.table.sessions
