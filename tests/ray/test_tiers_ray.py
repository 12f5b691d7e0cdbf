"""Tiers switched on in a running cluster: the upper one is answered while a crowd of the lower one holds every slot."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
from watching import await_true

pytestmark = pytest.mark.ray

TIERS = {
    "enable_user_qos": True,
    "user_groups": ["Platinum", "Bronze"],
    "user_group_map": {
        "Platinum": [{"id": "vip", "quota_pct": 100}],
        "Bronze": [{"id": "default", "quota_pct": 100}],
    },
}
TOKENS = 1900  # of each answer of the crowd, with as many slots in use: far longer than all that is asked meanwhile


def write(file: Path, qos: dict[str, Any]) -> None:
    """Whole at once: a cluster reads it."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(qos))
    os.replace(new, file)


def await_tiers(cluster: Any, names: list[str]) -> None:
    """The dispatcher and each engine have read the file."""
    import ray

    actors = {a["name"]: a for a in ray.util.list_named_actors(all_namespaces=True)}
    ranks = [ray.get_actor(**actors[f"rank-{row.info.id}-0"]) for row in cluster.ready()]

    def read() -> bool:
        table = ray.get(cluster.dispatcher().status.remote(), timeout=30)
        engines = ray.get(
            [r.__ray_call__.remote(lambda a: len(a._server._engine.ordering.policy.config.tiers)) for r in ranks],
            timeout=30,
        )
        queues = {model: [t.tier for t in table.tiers if t.model == model] for model in ("demo", "second")}
        return all(q == names for q in queues.values()) and engines == [max(len(names), 1)] * len(ranks)

    await_true(read, f"not all have read that the tiers are {names}")


@contextlib.contextmanager
def tiers(cluster: Any) -> Iterator[None]:
    """They hold in the block."""
    before = json.loads(cluster.qos_file.read_text())
    write(cluster.qos_file, TIERS)
    try:
        await_tiers(cluster, TIERS["user_groups"])  # type: ignore[arg-type]
        yield
    finally:
        write(cluster.qos_file, before)
        await_tiers(cluster, [])


class Asked:
    """A completion of the crowd: in a `with` block what comes of it is read and dropped; at its end it is given up."""

    def __init__(self, cluster: Any, **body: Any) -> None:
        parts = urlsplit(cluster.base_url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        whole = {"model": "demo", "prompt": "Hello", "user_id": "one-of-many", "ignore_eos": True, **body}
        headers = {"content-type": "application/json"}
        self._connection.request("POST", parts.path + "/completions_qos", json.dumps(whole), headers)
        self._reader = threading.Thread(target=self._read)
        self.answered = False

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self._connection.sock.recv(1 << 16):
                self.answered = True

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()


def test_the_upper_tier_is_answered_while_the_lower_one_holds_all_slots(cluster: Any) -> None:
    """Engines that let nobody yield fail it."""
    slots = [row.info.max_num_seqs for row in cluster.ready()]
    before = sum(row.load.preemptions for row in cluster.rows())
    with tiers(cluster), contextlib.ExitStack() as crowd:
        for number in slots:
            crowd.enter_context(Asked(cluster, n=number, max_tokens=TOKENS, stream=True))
        await_true(lambda: [row.load.running for row in cluster.rows()] == slots, "the crowd does not hold all slots")
        last = crowd.enter_context(Asked(cluster, max_tokens=1))
        await_true(lambda: any(row.load.waiting for row in cluster.rows()), "no request of the crowd waits")
        status, answer = cluster.post(
            "/chat/completions_qos",
            {"model": "demo", "messages": "What is 3 + 4?", "user_id": "vip", "max_tokens": 4, "ignore_eos": True},
        )
        was_answered = last.answered
        assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        assert not was_answered, "nobody had to wait"
    assert sum(row.load.preemptions for row in cluster.rows()) > before, "nobody yielded a slot"
