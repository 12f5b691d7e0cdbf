"""Two models in one cluster: each has its replicas and limits, the front serves both, and says what there is."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from watching import await_true

pytestmark = pytest.mark.ray

MODELS = ("demo", "second")
MESSAGES = [{"role": "user", "content": "What is 3 + 4?"}]


def explained(cluster: Any, request_id: str) -> dict[str, Any]:
    """What became of a request; asked for once it has a lease in its story."""
    told: dict[str, Any] = {}

    def known() -> bool:
        with urllib.request.urlopen(f"{cluster.base_url.removesuffix('/v1')}/requests/{request_id}/explain") as answer:
            told.update(json.load(answer))
        return bool(told["leases"])

    await_true(known, "the story has no lease")
    return told


def test_a_request_runs_on_replicas_of_its_model(cluster: Any) -> None:
    await_true(lambda: cluster.ready("second"), "the second model has no replica")
    said = []
    for model in MODELS:
        request = urllib.request.Request(
            cluster.base_url + "/chat/completions",
            data=json.dumps({"model": model, "messages": MESSAGES, "temperature": 0}).encode(),
            headers={"content-type": "application/json", "x-request-id": f"of-{model}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = json.load(answer)
        assert body["model"] == model
        said.append(body["choices"][0]["message"]["content"])
        (lease,) = explained(cluster, f"of-{model}")["leases"]
        assert {c["replica"] for c in lease["candidates"]} == {r.info.id for r in cluster.ready(model)}
    assert said[0] == said[1], "they are of the same weights"
    assert [r.info.num_blocks for r in cluster.rows("second")] == [64]
    assert all(r.info.num_blocks > 64 for r in cluster.rows())


def test_an_unknown_model_is_told_what_there_is(cluster: Any) -> None:
    for model in ("nope", "demo-2"):
        status, answer = cluster.post("/chat/completions", {"model": model, "messages": MESSAGES})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert answer["error"]["message"].endswith("There are: demo, second.")


def test_status_shows_both(cluster: Any) -> None:
    import ray

    from cluster.room import nodes_with_room, rank_homes, waiting_replicas
    from cluster.status_view import view_of

    await_true(lambda: cluster.ready("second"), "the second model has no replica")
    table = ray.get(cluster.dispatcher().status.remote(), timeout=30)
    view = view_of(table, nodes_with_room(), rank_homes(), fronts=(), unplaced=waiting_replicas())
    assert sorted(one.model for one in view.replicas) == ["demo", "demo", "second"]
    assert all(len(one.ranks) == 1 for one in view.replicas), "where their ranks are"
    (second,) = (line for line in view.as_text().splitlines() if " of second: ready" in line)
    assert "of 64 blocks free" in second
