"""What counts as left over."""

from __future__ import annotations

from collections import Counter

from chaos.ledgers import FILES_SLACK, Baseline, grown
from router.vitals import Vitals

RANK, GCS = Vitals(0, 10, 20, 200 << 20), Vitals(0, 30, 70, 50 << 20)
BEFORE = Baseline(Counter(rank=2, gcs=1), {"rank": RANK, "gcs": GCS}, 9)


def after(rank: Vitals = RANK, gcs: Vitals = GCS, tasks: int = 9, ranks: int = 2) -> Baseline:
    return Baseline(Counter(rank=ranks, gcs=1), {"rank": rank, "gcs": gcs}, tasks)


def test_as_before_is_nothing() -> None:
    assert grown(BEFORE, after()) == ""
    assert grown(Baseline(Counter(gcs=1), {"gcs": GCS}, 9), Baseline(Counter(gcs=1), {"gcs": GCS}, 9)) == ""


def test_processes_tasks_files_and_memory_of_ours_are_held_to_what_they_were() -> None:
    assert "processes" in grown(BEFORE, after(ranks=3))
    assert "tasks" in grown(BEFORE, after(tasks=10))
    assert "rank" in grown(BEFORE, after(Vitals(0, 10, 21 + FILES_SLACK, 200 << 20)))
    assert "rank" in grown(BEFORE, after(Vitals(0, 10, 20, 300 << 20)))
    assert grown(BEFORE, after(gcs=Vitals(0, 99, 99, 60 << 20))) == ""
