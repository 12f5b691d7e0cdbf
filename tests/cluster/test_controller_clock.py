"""A wall clock that goes back is noticed; one that is ahead, behind, or answers late is not to blame."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import controller_clock
from cluster.controller_clock import MOST_BACK, Stepping, keep_controller_in_time

DAY = 86_400.0


def test_a_day_forth_is_nothing_and_back_is_a_day() -> None:
    stepping = Stepping()
    assert stepping.back(0.0, 1000.0, 0.1) == 0.0
    assert stepping.back(2.0, 1002.0 + DAY, 2.1) == 0.0
    assert stepping.back(4.0, 1004.0, 4.1) == pytest.approx(DAY, abs=0.2)
    assert stepping.back(6.0, 1006.0, 6.1) == 0.0, "it is said once"


def test_an_answer_that_comes_late_is_no_step() -> None:
    stepping = Stepping()
    stepping.back(0.0, 1000.0, 0.1)
    assert stepping.back(2.0, 1002.0, 9.0) == 0.0, "said at once, heard late"
    assert stepping.back(10.0, 1017.0, 17.0) == 0.0, "asked at a busy controller"
    assert stepping.back(18.0, 1018.0 - MOST_BACK / 2, 18.1) == 0.0, "a correction of a second"


async def test_the_controller_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a look at one that is not there, and only once."""
    clocks = iter([1e9 + DAY, 1e9, 1e9])
    looks: list[str] = []
    killed: list[tuple[Any, bool]] = []
    done = asyncio.Event()

    async def metrics() -> dict[str, float]:
        clock = next(clocks, None)
        if clock is None:
            done.set()
            await asyncio.Event().wait()
        return {"timestamp": clock or 0.0}

    controller = SimpleNamespace(get_health_metrics=SimpleNamespace(remote=metrics))

    def get_actor(name: str, namespace: str) -> Any:
        looks.append(name)
        if len(looks) == 1:
            raise ValueError("no such actor")
        return controller

    monkeypatch.setattr(controller_clock, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr("ray.get_actor", get_actor)
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: killed.append((actor, no_restart)))
    watch = asyncio.create_task(keep_controller_in_time())
    await done.wait()
    watch.cancel()
    assert killed == [(controller, False)]
