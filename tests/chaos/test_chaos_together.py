"""Runs beside each other count as one."""

from __future__ import annotations

from typing import Any

from chaos.judge import Fate
from chaos.report import Report
from chaos.together import together
from chaos.trial import Trial


def run(seed: int, *trials: Trial, finished: bool = True, ledgers: tuple[str, ...] = ()) -> dict[str, Any]:
    return Report(
        f"run {seed}", seed, {"replicas": 4}, list(trials), list(ledgers), seconds=10.0 * seed, finished=finished
    ).as_json()


def test_what_one_run_lost_all_have_lost() -> None:
    good = Trial(0, "rank killed", in_flight=9, judged=12, fates={Fate.EXACT: 12}, failover=0.25)
    bad = Trial(1, "rank killed", in_flight=8, judged=8, fates={Fate.TORN: 1, Fate.EXACT: 7}, lost=1, wrong=["torn: x"])
    whole = together([run(1, good, good), run(2, good, bad), run(3)])
    said = whole.as_json()
    assert (said["lost"], said["requests"], said["seconds"], said["finished"]) == (1, 44, 30.0, True)
    row = said["by_fault"]["rank killed"]
    assert (row["trials"], row["failed"], row["in_flight"], row["fates"]) == (4, 1, 35, {"exact": 43, "torn": 1})
    assert row["failover"]["n"] == 3
    assert whole.failed
    assert not together([run(1, good), run(2, good)]).failed


def test_a_cut_run_and_open_books_are_told() -> None:
    good = Trial(0, "rank killed", in_flight=9, judged=12, fates={Fate.EXACT: 12})
    whole = together([run(1, good), run(2, good, finished=False, ledgers=("a lease is held",))])
    assert not whole.finished
    assert whole.ledgers == ["seed 2: a lease is held"]
    assert whole.failed
