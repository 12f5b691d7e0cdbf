"""Random engines under random traffic. ECHELON_ENGINE_RUNS says how many seeded runs (default 300, a release 10,000).

What is checked after each run stands in `traffic.py`, which is also a program that counts what the runs reached.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import Traffic, run_seeds

from workers.api.request import FinishReason

RUNS = int(os.environ.get("ECHELON_ENGINE_RUNS", "300"))
BATCH = 50


@pytest.mark.parametrize("batch", range(-(-RUNS // BATCH)))
def test_seeded_runs(batch: int) -> None:
    counts = run_seeds(range(batch * BATCH, (batch + 1) * BATCH))
    assert counts["terminal deltas"] == counts["answers"] > 0


def test_the_seeded_runs_reach_what_they_are_for() -> None:
    counts = run_seeds(range(80))
    kinds = (
        "preemption",
        "preempted more than once",
        "prefix hit",
        "copied back",
        "step-ahead discard",
        "request fault",
    )
    kinds += (
        "engine fault",
        "resumed",
        "beam search",
        "beam goes on",
        "beam taken over",
        *(f"finish {reason}" for reason in FinishReason),
    )
    assert {kind: counts[kind] for kind in kinds if counts[kind] < 2} == {}


@settings(max_examples=50, deadline=None)
@given(rng=st.randoms(use_true_random=False), operations=st.integers(1, 80))
def test_runs_that_hypothesis_draws(rng: random.Random, operations: int) -> None:
    Traffic(rng).run(operations)
