"""What `echelon serve` says of the replicas that start after its first answer.

`cluster.app` is named in strings only: imported here, it would read Ray's settings before the Ray tests have made them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cluster import serving
from workers.api.errors import EchelonError


def silent(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("looks", [1, 3])
def test_all_are_up(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.app.POLL_SECONDS", 0.001)
    answers = [False] * (looks - 1) + [True]
    monkeypatch.setattr("cluster.app.watch_start", lambda progress: answers.pop(0))
    assert "all 2 replicas are up" in serving.await_others(2, threading.Event(), time.monotonic(), silent)
    assert not answers


def test_a_stop_in_between_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.app.watch_start", lambda progress: False)
    stop = threading.Event()
    stop.set()
    assert "not all" in serving.await_others(2, stop, time.monotonic(), silent)


def test_a_failed_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(progress: Callable[[str], None]) -> bool:
        raise EchelonError("no room on the node")

    monkeypatch.setattr("cluster.app.watch_start", fail)
    said = serving.await_others(2, threading.Event(), time.monotonic(), silent)
    assert "serve on" in said
    assert "no room on the node" in said


def test_a_replica_without_room_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [["replica a waits for room: none", "starting the replicas"], ["replica a waits for room: none"], []]

    def look(progress: Callable[[str], None]) -> bool:
        for line in looks.pop(0):
            progress(line)
        return not looks

    monkeypatch.setattr("cluster.app.POLL_SECONDS", 0.001)
    monkeypatch.setattr("cluster.app.watch_start", look)
    said: list[str] = []
    serving.await_others(2, threading.Event(), time.monotonic(), said.append)
    assert said == ["  warning: replica a waits for room: none"]
