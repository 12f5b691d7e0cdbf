"""The suite of the workloads: floors, goals, the table made of them, and all workloads at a small size on the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pytest
import suite
import workloads
from load.engine_target import EngineTarget, load_rank
from load.goals import COPY, GOALS, PRODUCT, THEN, Goal, least_seconds
from load.records import Record, Run, make_console
from load.work import Pacing, Work, make_work

MACHINE = {COPY: 3000.0, PRODUCT: 770.0}
BY_NAME = {(g.workload, g.figure): g for g in GOALS}


def test_floors_of_one_sequence_are_the_reading_of_the_weights() -> None:
    weights = 2 * workloads.weight_counts()["read_per_step"] / 3e12
    assert BY_NAME["W1", "ftl_ms_mean"].floor(MACHINE) == pytest.approx(1e3 * weights)
    assert BY_NAME["W1", "tpot_ms_mean"].floor(MACHINE) == pytest.approx(1e3 * weights, rel=0.01)


def test_floors_of_prompts_are_their_operations() -> None:
    counts, channels = workloads.weight_counts(), 32 * 32 * 128
    by_hand = 8000 * (2 * counts["matmul_per_token"] + 4 * channels * 4000) / 770e12
    assert BY_NAME["W4b", "ftl_ms_mean"].floor(MACHINE) == pytest.approx(1e3 * by_hand)
    # What is shared is computed once: 128 prompts of 64 tokens behind 1,024 cost less than 20 of 1,088.
    shared = least_seconds([(1088, 1)] * 128, MACHINE, shared=1024)[0]
    assert shared < least_seconds([(1088, 1)] * 20, MACHINE)[0]


@pytest.mark.parametrize("goal", GOALS, ids=lambda g: f"{g.workload}-{g.figure}")
def test_goals_lie_between_vllm_and_the_floor(goal: Goal) -> None:
    assert goal.scaled(THEN) == pytest.approx(goal.vllm)
    assert goal.times_as_good(goal.asked, goal.vllm) >= 1.0
    assert goal.times_as_good(goal.floor(MACHINE), goal.asked) > 1.0
    worse = goal.asked * (1.01 if goal.least else 0.99)
    assert goal.reached(goal.asked)
    assert not goal.reached(worse)
    faster = {name: 1.1 * value for name, value in THEN.items()}
    assert goal.times_as_good(goal.scaled(faster), goal.vllm) == pytest.approx(1.1)


class Counting:
    """A target that runs nothing."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        self.runs += 1
        return Run([Record(len(w.prompt), tokens=w.out) for w in work], float(self.runs))


def test_a_slow_peer_runs_once_and_others_as_often_as_asked() -> None:
    given = argparse.Namespace(repeat=3, small=True, vocab=1000)
    target = Counting()
    assert [r.seconds for r in suite.repeated(target, "W1", given, make_console(), seconds=1e9)] == [2.0, 3.0, 4.0]
    slow = Counting()
    assert [r.seconds for r in suite.repeated(slow, "W1", given, make_console(), seconds=0.0)] == [1.0]


def test_the_table_names_what_was_missed() -> None:
    def rows(factor: float) -> dict[str, dict[str, dict[str, float]]]:
        made: dict[str, dict[str, dict[str, float]]] = {}
        for goal in GOALS:
            value = goal.asked / factor if goal.least else goal.asked * factor
            figures = {goal.figure: value, "requests_per_s": 5.0} if goal.figure != "requests_per_s" else {
                goal.figure: value}  # fmt: skip
            for name, one in figures.items():
                made.setdefault(goal.workload, {})[name] = {"median": one, "min": one, "max": one, "n": 3}
        return made

    for factor, missed in ((1.01, 0), (0.99, len(GOALS))):
        measured = {who: {"ceilings": MACHINE, "rows": rows(factor)} for who in ("echelon", "transformers")}
        assert len(suite.table(measured, list(suite.NAMES))[1]) == missed


@pytest.mark.slow
def test_all_workloads_at_a_small_size() -> None:
    target = EngineTarget(load_rank("demo", suite.limits(small=True), threads=1))
    for name in suite.NAMES:
        work = make_work(name, rep=1, divide=suite.SMALL_DIVIDE, vocab=target.rank.vocab_size)[: suite.SMALL_REQUESTS]
        run = target.run(work, Pacing(), lambda: None)
        assert [r.tokens for r in run.records] == [w.out for w in work], name
        assert not any(r.error for r in run.records)
        if name == "W5":
            assert sum(r.cached_tokens for r in run.records) > 0
