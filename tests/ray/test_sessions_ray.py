"""A session of /v1/chat/interactive in a cluster: its rounds go where its blocks are, and it outlives its replica."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

pytestmark = pytest.mark.ray

GREEDY = {"model": "demo", "temperature": 0, "top_p": 1, "top_k": -1}
LONG = "Count from 1 to 20. " * 12


def test_a_session_goes_on_where_its_blocks_are_and_outlives_its_replica(cluster: Any, await_replicas: Any) -> None:
    said: list[str] = []
    seen: dict[str, int] = {row.info.id: row.load.executed_tokens for row in cluster.ready()}

    def say(text: str) -> dict[str, Any]:
        body = {"prompt": text, "session_id": 77, "interactive_mode": True, "request_output_len": 24, **GREEDY}
        status, answer = cluster.post("/chat/interactive", body)
        assert status == 200, answer
        said.extend([text, answer["text"]])
        return answer

    def where() -> str:
        """The replica that has run the most since the last look: the other one has its canaries' tokens only."""
        cluster.check_ledgers()
        ran = {row.info.id: row.load.executed_tokens for row in cluster.ready()}
        most = max(ran, key=lambda name: ran[name] - seen.get(name, 0))
        seen.update(ran)
        return most

    first = say(LONG)
    home = where()
    assert first["history_tokens"] == 0
    second = say("And 3 + 4?")
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    assert where() == home
    victim = next(row for row in cluster.ready() if row.info.id == home)
    os.kill(victim.info.pid, signal.SIGKILL)
    third = say("Why?")
    assert third["history_tokens"] == sum(second[n] for n in ("history_tokens", "input_tokens", "tokens"))
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said[:-1])]
    status, whole = cluster.post("/chat/completions", {"messages": messages, "max_tokens": 24, **GREEDY})
    assert (status, whole["choices"][0]["message"]["content"]) == (200, third["text"])
    await_replicas(without=home)
