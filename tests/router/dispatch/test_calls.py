"""Calls by Ray Serve handles in the order that the dispatcher's strategies give.

Mutants seen to fail: `ended` that learns nothing; running calls not counted; reports not taken in.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest

from router.dispatch.calls import CallPolicy, routing_stats
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport

from .virtual import Clock


def served(strategy: str, seconds: dict[str, float], *, calls: int = 300, at_once: int = 6) -> Counter[str]:
    """Who had how many of `calls`, `at_once` at a time, on replicas that work at one call after the other."""
    clock = Clock()
    policy = CallPolicy(strategy, clock=clock, rng=random.Random(0))
    policy.update({name: (100, {}) for name in seconds})
    free_at = dict.fromkeys(seconds, clock.now)
    ends: list[tuple[float, str]] = []
    taken: Counter[str] = Counter()
    for number in range(calls):
        if len(ends) >= at_once:
            clock.now, ended = heapq.heappop(ends)
            policy.ended(ended)
        name = policy.order(seconds)[0]
        taken[name] += 1
        policy.began(f"{number}", name)
        free_at[name] = max(free_at[name], clock.now) + seconds[name]
        heapq.heappush(ends, (free_at[name], f"{number}"))
    assert sum(r.slots for r in policy._replicas.values()) == len(ends)
    return taken


def test_calls_go_where_they_are_done_first_and_every_replica_was_tried() -> None:
    taken = served("min_expected_latency", {"slow": 0.4, "middle": 0.2, "fast": 0.1})
    assert taken["fast"] > taken["middle"] > taken["slow"] > 0
    assert taken["fast"] > 0.45 * 300


def test_idle_replicas_are_ranked_by_how_long_their_calls_took() -> None:
    clock, seconds = Clock(), {"slow": 0.4, "fast": 0.1, "middle": 0.2}
    policy = CallPolicy("min_expected_latency", clock=clock, rng=random.Random(0))
    policy.update({name: (100, {}) for name in seconds})
    for name, took in seconds.items():
        for number in range(5):
            policy.began(f"{name}{number}", name)
            clock.now += took
            policy.ended(f"{name}{number}")
    assert policy.order(seconds) == ["fast", "middle", "slow"]


def test_round_robin_is_round_robin() -> None:
    assert set(served("round_robin", {"slow": 0.4, "middle": 0.2, "fast": 0.1}).values()) == {100}


def test_recorded_loads_are_believed() -> None:
    policy = CallPolicy("min_expected_latency", clock=Clock(), rng=random.Random(0))
    loads = {
        "busy": LoadReport(7, 0.1, decode_tokens=8, running=8, prefill_backlog=90_000),
        "idle": LoadReport(7, 0.1, decode_tokens=8, running=8),
    }
    policy.update({name: (100, routing_stats(load)) for name, load in loads.items()})
    assert policy.order(loads, prompt_tokens=100) == ["idle", "busy"]


def test_a_replica_that_goes_takes_its_calls_along() -> None:
    policy = CallPolicy("min_expected_latency", clock=Clock(), rng=random.Random(0))
    policy.update({"a": (10, {}), "b": (10, {})})
    policy.began("1", "a")
    policy.update({"b": (10, {})})
    policy.ended("1")
    policy.began("2", "a")
    assert policy.order(["b"]) == ["b"]
    assert not policy._calls


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="luck"):
        CallPolicy("luck", clock=Clock(), rng=random.Random(0))
