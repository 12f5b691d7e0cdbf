"""A small version of `benchmarks/simulate.py guarantees`: the shipped engine and policy hold what docs/qos.md says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from simulation import cluster_fairness, fairness, guarantees, isolation
from simulation.device import LOOKING_BACK

from workers.engine import cost, scheduler

EFFORT = guarantees.Effort(trials=40, seconds=15.0, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["G1", "G2", "G4", "G5", "G8", "G9"])
def test_guarantee(name: str) -> None:
    row = guarantees.checked(name, EFFORT, lambda: None)
    assert row.passed, row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *cluster_fairness.ENGINE_DEFECTS])
def test_the_live_metric_where_engines_order_their_steps(name: str) -> None:
    """Silent in a sound run; a defect in the engines' order of steps makes it fire."""
    planted = cluster_fairness.ENGINE_DEFECTS.get(name, nullcontext)()
    assert (cluster_fairness.violations(planted, ordered=True) > 0) == bool(name)


@pytest.mark.slow
@pytest.mark.parametrize("looks_back", [True, False])
def test_gaps_stay_bounded_where_attention_over_prompts_costs(
    looks_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only since it is known to: chunks that are thought to cost the same wherever they start make steps longer."""
    if not looks_back:
        monkeypatch.setattr(cost, "pairs_of", lambda start, count: 0.0)
        monkeypatch.setattr(scheduler, "pairs_of", lambda start, count: 0.0)
    got = isolation.under(isolation.long_prompts, shape=replace(isolation.SHAPE, cost=LOOKING_BACK))
    assert (got.itl <= isolation.ITL_TARGET) == looks_back, got


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    state = tmp_path / "state"
    seen: list[int] = []
    guarantees.swept(guarantees.Effort(trials=3, state=state), lambda: seen.append(0))
    whole = state.read_text()
    state.write_text(whole + '[7, 0.5, "cut of')
    found = guarantees.swept(guarantees.Effort(trials=5, state=state), lambda: seen.append(1))
    assert seen == [0, 0, 0, 1, 1]
    assert set(found) == set(range(5))
    assert guarantees.read_state(state).keys() >= {0, 1, 2, 3, 4}


def test_what_a_check_asserts_on_its_way_is_a_row_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(effort: guarantees.Effort, tick: object) -> None:
        raise AssertionError("somebody is stuck")

    monkeypatch.setitem(guarantees.CHECKS, "G4", stuck)  # type: ignore[arg-type]
    row = guarantees.checked("G4", EFFORT, lambda: None)
    assert (row.passed, row.says) == (False, "somebody is stuck")


def test_traces_of_one_seed_are_one_trace() -> None:
    first, again = fairness.trace(5), fairness.trace(5)
    assert [(j.user, j.prompt, j.output, j.arrived) for j in first.jobs] == [
        (j.user, j.prompt, j.output, j.arrived) for j in again.jobs
    ]
    assert first.shape == again.shape
