"""Health from the dispatcher's table: progress, and how old the news of it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from router.cluster_status import HEALTHY_SECONDS, ClusterStatus
from router.dispatch.client import DispatcherClient
from router.dispatch.lease import ReplicaRow, ReplicaState, ReplicaTable
from workers.api.replica import LoadReport, ReplicaInfo


def row(name: str, state: ReplicaState, since_step: float, step_seconds: float = 0.01, model: str = "m") -> ReplicaRow:
    info = ReplicaInfo(name, model, "host", 1, 4096, 4, 100, 16)
    return ReplicaRow(info, state, LoadReport(1), 0, 0, 1000.0, step_seconds, 0.0, since_step)


def told(*rows: ReplicaRow, age: float = 0.0, models: Sequence[str] = ()) -> ClusterStatus:
    async def nowhere() -> tuple[str, int]:
        raise ConnectionError

    client = DispatcherClient("ingress", secret="", locate=nowhere)
    client.table, client.table_at = ReplicaTable(rows, 0), 100.0
    return ClusterStatus(client, clock=lambda: 100.0 + age, models=models)


READY, SUSPECT, DRAINING = ReplicaState.READY, ReplicaState.SUSPECT, ReplicaState.DRAINING


@pytest.mark.parametrize(
    ("healthy", "status"),
    [
        (False, told()),
        (True, told(row("a", READY, 1.0))),
        (True, told(row("a", SUSPECT, 1.0), row("b", READY, 1.0))),
        (False, told(row("a", SUSPECT, 1.0), row("b", DRAINING, 1.0))),
        (False, told(row("a", READY, math.inf))),
        (False, told(row("a", READY, HEALTHY_SECONDS + 1))),
        (True, told(row("a", READY, HEALTHY_SECONDS + 1, step_seconds=1.0))),
        (True, told(row("a", READY, 1.0), age=HEALTHY_SECONDS - 2)),
        (False, told(row("a", READY, 1.0), age=HEALTHY_SECONDS)),
        (True, told(row("a", READY, 1.0), row("b", READY, 1.0, model="n"), models=("m", "n"))),
        (False, told(row("a", READY, 1.0), row("b", SUSPECT, 1.0, model="n"), models=("m", "n"))),
        (False, told(row("a", READY, 1.0), models=("m", "n"))),
    ],
)
def test_healthy_means_a_ready_replica_stepped_of_late(healthy: bool, status: ClusterStatus) -> None:
    assert status.healthy() is healthy


def test_without_a_dispatcher_nothing_is_ready() -> None:
    status = told(row("a", READY, 0.5), age=1.0)
    assert (status.live(), status.ready(), status.healthy()) == (True, False, True)
    assert [(r.id, r.since_step) for r in status.replicas()] == [("a", 1.5)]


async def test_health_says_how_long_ago(client, status):
    assert (await client.get("/health")).json() == {"status": "ok", "replicas": {}, "seconds_since_step": None}
    status.rows = list(told(row("a", SUSPECT, math.inf), row("b", READY, 1.234)).replicas())
    body = (await client.get("/health")).json()
    assert body == {"status": "ok", "replicas": {"suspect": 1, "ready": 1}, "seconds_since_step": 1.23}
