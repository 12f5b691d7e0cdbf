"""The policy behind Serve's types."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import autoscaling
from cluster.autoscaling import ExpectedWaitPolicy, latest_load, serve_autoscaling, stats_of
from router.dispatch.scaling import FleetLoad, ScalingConfig

CONFIG = ScalingConfig(min_replicas=1, max_replicas=3, up_after=2.0, down_after=10.0, cooldown=0.0)


def context(target: int, *reports: tuple[float, FleetLoad]) -> Any:
    """What Serve hands over: of each replica the series of every figure; here one report each, at a time in seconds."""
    metrics: dict[str, dict[str, list[Any]]] = {}
    for number, (at, load) in enumerate(reports):
        for name, value in stats_of(load).items():
            old = SimpleNamespace(timestamp=at - 1.0, value=-1.0)
            metrics.setdefault(name, {})[f"r{number}"] = [old, SimpleNamespace(timestamp=at, value=value)]
    return SimpleNamespace(target_num_replicas=target, raw_metrics=metrics)


def test_the_youngest_report_counts() -> None:
    young, old = FleetLoad(2, 7, 1.5, 0.75), FleetLoad(1, 99, 50.0, 1.0)
    assert latest_load(context(1, (100.0, old), (101.0, young), (99.0, old))) == young
    assert latest_load(context(1)) is None


def test_serve_s_policy_scales_up_and_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(autoscaling, "time", SimpleNamespace(monotonic=lambda: now[0]))
    policy = ExpectedWaitPolicy(**asdict(CONFIG))
    wanted, seen = 1, []
    for _ in range(80):
        now[0] += 0.5
        load = FleetLoad(wanted, 5, 1.5, 1.0) if now[0] < 8.0 else FleetLoad(wanted)
        wanted, state = policy(context(wanted, (now[0], load)))
        assert state == {}
        seen.append(wanted)
    assert [n for i, n in enumerate(seen) if n != seen[i - 1]] == [2, 3, 2, 1]


def test_serve_makes_the_policy_from_its_configuration() -> None:
    """Serve takes the class by value, and makes it with these arguments in its controller."""
    config = serve_autoscaling(CONFIG, replicas=2)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context(9))[0] == 3
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 2, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
