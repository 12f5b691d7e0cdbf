"""Clients that are not Python: the openai package for Node, unmodified, and plain curl.

The first needs `node` and the package (`npm install openai` somewhere, NODE_PATH=.../node_modules), or it is skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).with_name("openai_node.cjs")
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


def node_has_openai() -> bool:
    if shutil.which("node") is None:
        return False
    look = subprocess.run(
        ["node", "-e", "require.resolve('openai')"], cwd=SCRIPT.parent, capture_output=True, check=False
    )
    return look.returncode == 0


def test_openai_for_node(cluster: Any) -> None:
    if not node_has_openai():
        pytest.skip("needs node and its openai package: npm install openai, NODE_PATH=.../node_modules")
    run = subprocess.run(
        ["node", str(SCRIPT), cluster.base_url], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["models"] == ["demo"]
    assert "12" in seen["text"]
    assert seen["text"] == seen["streamed"] == seen["accumulated"]
    assert [seen["finish"]] == seen["streamedFinish"] == ["stop"]
    assert seen["usage"] == seen["streamedUsage"]
    assert seen["completions"] == [0, 1]
    assert (seen["atOnce"], seen["left"]) == (16, 5)
    refused = {"class": "BadRequestError", "status": 400, "code": "decimal_above_max_value", "param": "temperature",
               "type": "invalid_request_error", "id": True}  # fmt: skip
    assert seen["badRequest"] == seen["badStream"] == refused
    assert (seen["notFound"]["class"], seen["notFound"]["code"]) == ("NotFoundError", "model_not_found")


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(cluster: Any) -> None:
    post = [f"{cluster.base_url}/chat/completions", "-H", "content-type: application/json", "-d"]
    whole = json.loads(curl(*post, json.dumps(CHAT)))["choices"][0]["message"]["content"]
    assert "7" in whole
    *events, done, nothing = curl("--no-buffer", *post, json.dumps(CHAT | {"stream": True})).split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(e.removeprefix("data: ")) for e in events]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole
    refused = curl("--write-out", "\n%{http_code} %{content_type}", *post, "{")
    body, _, status = refused.rpartition("\n")
    assert status == "400 application/json"
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
