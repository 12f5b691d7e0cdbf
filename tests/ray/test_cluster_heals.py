"""What dies comes back, and clients do not notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from watching import await_true

pytestmark = pytest.mark.ray


def health(cluster: Any) -> int:
    try:
        with urllib.request.urlopen(cluster.base_url.removesuffix("/v1") + "/health", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_rank_killed_while_idle(cluster: Any, await_replicas: Any) -> None:
    victim = cluster.ready()[0]
    kill(victim.info.pid)
    assert "7" in cluster.chat("What is 3 + 4?")["choices"][0]["message"]["content"]
    await_replicas(without=victim.info.id)
    assert "7" in cluster.chat("What is 3 + 4?")["choices"][0]["message"]["content"]


def test_a_supervisor_killed_while_idle(cluster: Any, await_replicas: Any) -> None:
    import ray

    from cluster.names import replicas_app

    victim = cluster.ready()[0].info.id
    supervisor = ray.get_actor(f"SERVE_REPLICA::{replicas_app('demo')}#demo#{victim}", namespace="serve")
    ray.kill(supervisor)
    for _ in range(5):
        assert "7" in cluster.chat("What is 3 + 4?")["choices"][0]["message"]["content"]
    await_replicas(without=victim)


def test_ranks_stopped_while_idle(cluster: Any, await_replicas: Any) -> None:
    """They hang without a word: health says so, the log names them, and both are replaced."""
    import ray

    victims = cluster.ready()
    for victim in victims:
        os.kill(victim.info.pid, signal.SIGSTOP)
    try:
        await_true(lambda: health(cluster) == 503, "/health does not notice two hung replicas")
        for victim in victims:
            await_replicas(without=victim.info.id)
    finally:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                kill(victim.info.pid)
    await_true(lambda: health(cluster) == 200, "/health does not come back")
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    said = "".join(path.read_text("utf-8", "replace") for path in logs.glob("replica_*"))
    for victim in victims:
        assert f"replica {victim.info.id} ends: rank 0 (pid {victim.info.pid}) has not answered" in said
    assert "7" in cluster.chat("What is 3 + 4?")["choices"][0]["message"]["content"]


NOTES = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "lines": {"type": "array", "items": {"type": "string"}}},
    "required": ["title", "lines"],
    "additionalProperties": False,
}
AS_NOTES = {"type": "json_schema", "json_schema": {"name": "notes", "schema": NOTES}}


@pytest.mark.parametrize("kind", ["text", "structured"])
def test_a_stream_goes_on_when_its_replica_is_killed(cluster: Any, await_replicas: Any, kind: str) -> None:
    client = openai.OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0)
    body: Any = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Count from 1 to 20."}],
        "temperature": 0,
        "max_tokens": 600,
        **({"extra_body": {"ignore_eos": True}} if kind == "text" else {"response_format": AS_NOTES}),
    }
    whole = client.chat.completions.create(**body).choices[0].message.content
    pieces: list[str] = []
    victim = ""
    for chunk in client.chat.completions.create(**body, stream=True):
        pieces.append((chunk.choices[0].delta.content or "") if chunk.choices else "")
        if len(pieces) == 20:
            row = next(r for r in cluster.rows() if r.leases)
            victim = row.info.id
            kill(row.info.pid)
    assert victim
    assert "".join(pieces) == whole
    if kind == "structured":
        jsonschema.validate(json.loads(whole), NOTES)
    await_replicas(without=victim)


def test_the_dispatcher_killed_under_load(cluster: Any) -> None:
    import ray

    answers: list[str] = []

    def ask() -> None:
        answers.extend(
            cluster.chat(f"What is {i} + 4?", temperature=0)["choices"][0]["message"]["content"] for i in range(10)
        )

    thread = threading.Thread(target=ask)
    thread.start()
    ray.kill(cluster.dispatcher(), no_restart=False)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(answers) == 10
