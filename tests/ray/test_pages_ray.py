"""The web pages and their routes through the edge of a real cluster."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from watching import await_true

from router.web.assets import read_assets

pytestmark = pytest.mark.ray


def test_pages_pass_the_edge_and_their_routes_know_the_cluster(cluster: Any) -> None:
    root = cluster.base_url.removesuffix("/v1")
    for path, asset in read_assets().items():
        with urllib.request.urlopen(root + path, timeout=30) as answer:
            assert answer.read() == asset.body, path
            assert "require-trusted-types-for" in answer.headers["content-security-policy"]

    def get(path: str) -> Any:
        with urllib.request.urlopen(root + path, timeout=30) as answer:
            return json.load(answer)

    assert get("/me")["models"].keys() == {"demo", "second"}
    cluster.chat("What is 3 + 4?", user="bob")
    ended = get("/cluster")["activity"]["ended"]
    assert any(e["user"] == "bob" and e["outcome"] == "stop" for e in ended)

    def placed() -> bool:
        replicas = get("/cluster")["replicas"]
        return len(replicas) == 3 and all(len(r["ranks"]) == 1 for r in replicas)

    await_true(placed, "where the ranks are is not known")
