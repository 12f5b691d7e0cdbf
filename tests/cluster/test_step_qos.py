"""The policy that a replica's engine is handed: made of the file, sized by the engine, and following the file.

Mutants seen to fail: limits without the pool; `follow` that applies a change in its own thread.
"""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from cluster import step_qos
from cluster.step_qos import StepQos
from workers.api.errors import ConfigError
from workers.api.replica import ReplicaInfo
from workers.api.request import EngineRequest, SamplingParams

INFO = ReplicaInfo("r", "m", "", 0, 4096, 8, 100, 16, "", 0, 256)
FILE = "user_groups: [top]\nuser_group_map: {top: [{id: anna, quota_pct: %d}, {id: default, quota_pct: 10}]}"


class Server:
    """Keeps what is to be done between two steps."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.called = threading.Event()

    def between_steps(self, call: object) -> None:
        self.calls.append(call)
        self.called.set()


def asked(owner: str) -> EngineRequest:
    return EngineRequest("1", (1,), SamplingParams(max_tokens=1), owner=owner)


def test_it_travels_and_is_sized_by_the_engine(tmp_path: Path) -> None:
    (tmp_path / "qos.yaml").write_text(FILE % 90)
    qos = pickle.loads(pickle.dumps(StepQos.read(tmp_path / "qos.yaml")))
    ordering = qos.ordering(INFO)
    assert ordering.policy.limits.step == 2.0 * 256 + 0.002 * 1600
    assert ordering.policy.limits.longest == 1600.0  # the pool is less than the context
    assert (ordering.flow(asked("anna")).weight, ordering.flow(asked("ben")).account.id) == (90.0, "default")


def test_a_bad_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "qos.yaml").write_text("user_groups: []")
    with pytest.raises(ConfigError):
        StepQos.read(tmp_path / "qos.yaml")


def test_it_follows_the_file_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_qos, "LOOK_SECONDS", 0.005)
    file = tmp_path / "qos.yaml"
    file.write_text(FILE % 90)
    qos = StepQos.read(file)
    ordering, server = qos.ordering(INFO), Server()
    standing = ordering.flow(asked("anna"))
    file.write_text(FILE % 40)
    qos.follow(ordering, server)  # type: ignore[arg-type]
    assert server.called.wait(20)
    assert standing.weight == 90.0  # not before the engine's thread makes the call
    for call in list(server.calls):
        call()  # type: ignore[operator]
    assert ordering.flow(asked("anna")) is standing
    assert standing.weight == 40.0
