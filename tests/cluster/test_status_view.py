"""What `echelon status` says of a table, in words and in JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from cluster.placement import Node
from cluster.status_view import view_of
from router.dispatch.lease import ReplicaRow, ReplicaState, ReplicaTable
from workers.api.replica import LoadReport, ReplicaInfo

INFO = ReplicaInfo("gen1", "demo", "10.0.0.1", 4000, 2048, 8, 64, 16, node="n1", pid=77)
ROW = ReplicaRow(
    INFO, ReplicaState.READY, LoadReport(5, running=3, waiting=1, free_blocks=40, total_blocks=64), leases=4, slots=4,
    prefill_rate=1.0, step_seconds=0.02, backlog_seconds=0.0, since_step=0.25,
)  # fmt: skip
NODES = [
    Node("n1", "10.0.0.1", {"CPU": 1.0, "GPU": 0.0}, {"CPU": 2.0, "GPU": 0.0}),
    Node("n2", "10.0.0.2", {"CPU": 0.0, "GPU": 0.0}, {"CPU": 1.0, "GPU": 0.0}),
]


def test_ranks_are_shown_where_they_are() -> None:
    fresh = replace(ROW, info=replace(INFO, id="gen2", node="n9"), state=ReplicaState.SUSPECT, since_step=float("inf"))
    table = ReplicaTable((ROW, fresh), waiting=2, waiting_by_model=(("demo", 2),))
    view = view_of(table, NODES, {"gen1": ["n1", "n2"]}, fronts=["ingress-1"], unplaced=["replica gen3 waits for room"])
    text = view.as_text()
    assert "10.0.0.1: 1 of 2 CPU free; ranks: gen1[0]" in text
    assert "10.0.0.2: 0 of 1 CPU free; ranks: gen1[1]" in text
    assert (
        "gen1 of demo: ready, last step 0.2 s ago; rank 0 on 10.0.0.1, rank 1 on 10.0.0.2; 3 run, 1 wait, 4 leases"
        in text
    )
    assert "gen2 of demo: suspect, no step yet; rank 0 on a node that is gone" in text
    assert "warning: replica gen3 waits for room" in text
    assert "requests without a lease: 2 of demo; fronts: 1" in text
    said = json.loads(view.as_json())
    assert [one["ranks"] for one in said["replicas"]] == [["10.0.0.1", "10.0.0.2"], ["a node that is gone"]]
    assert said["replicas"][1]["since_step"] is None
    assert said["waiting"] == {"demo": 2}
    assert said["nodes"][0]["free"] == {"CPU": 1.0, "GPU": 0.0}
