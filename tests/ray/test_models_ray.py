"""Two models in one cluster: each has its replicas and limits, the front serves both, and says what there is."""

from __future__ import annotations

from typing import Any

import pytest
from watching import await_true

pytestmark = pytest.mark.ray

MODELS = ("demo", "second")


def completed(cluster: Any, model: str) -> int:
    return sum(r.load.requests.completed for r in cluster.rows(model))


def test_a_request_runs_on_replicas_of_its_model(cluster: Any) -> None:
    await_true(lambda: cluster.ready("second"), "the second model has no replica")
    before = {model: completed(cluster, model) for model in MODELS}
    said = []
    for model, times in zip(MODELS, (2, 3), strict=True):
        for _ in range(times):
            answer = cluster.chat("What is 3 + 4?", model=model, temperature=0, max_tokens=12)
            assert answer["model"] == model
            said.append(answer["choices"][0]["message"]["content"])
    assert len(set(said)) == 1, "they are of the same weights"
    await_true(
        lambda: [completed(cluster, m) - before[m] for m in MODELS] == [2, 3],
        "each model's replicas should have had its own requests, and no others",
    )
    assert [r.info.num_blocks for r in cluster.rows("second")] == [64]
    assert all(r.info.num_blocks > 64 for r in cluster.rows())


def test_an_unknown_model_is_told_what_there_is(cluster: Any) -> None:
    for model in ("nope", "demo-2"):
        status, answer = cluster.post("/chat/completions", {"model": model, "messages": "hi"})
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
