"""What a start shows: lines without a terminal, bars on one.

Mutants seen to fail: a line each time; ranks that are up shown before those that load; a bar that stays when its rank
has gone.
"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.start_view import LINE_SECONDS, MOST_SHOWN, SAME_SECONDS, Bars, Lines, RankAt, start_view
from workers.api.replica import BYTES, UP, Stage

GB = 1 << 30


def at(replica: str, stage: Stage, rank: int = 0, *, alone: bool = True) -> RankAt:
    return RankAt(replica, rank, alone, stage)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage("imports"), "imports"),
        (Stage("weights", 3 * GB, 16 * GB, BYTES), "weights, 3.0 of 16.0 GiB"),
        (Stage("weights", 0, 9_800_000, BYTES), "weights, 0.0 of 9.3 MiB"),
        (Stage("weights", 3, 700, BYTES), "weights, 3 of 700 bytes"),
        (Stage("graphs", 3, 35, "shapes"), "graphs, 3 of 35 shapes"),
        (Stage("kernels", 12, unit="compiled"), "kernels, 12 compiled"),
    ],
)
def test_a_stage_in_words(stage: Stage, words: str) -> None:
    assert str(stage) == words


def test_without_a_terminal_a_line_says_now_and_then_how_far_all_are() -> None:
    said: list[str] = []
    now = [0.0]
    lines = Lines(said.append, clock=lambda: now[0])
    lines.say("starting Ray")
    lines.say("starting Ray")
    ranks = [at("b", UP), at("a", Stage("weights", GB, 2 * GB, BYTES), 1, alone=False)]
    lines.show(ranks)
    assert said == ["starting Ray"]
    now[0] = LINE_SECONDS
    lines.show([])
    while now[0] < LINE_SECONDS + 1.5 * SAME_SECONDS:
        now[0] += LINE_SECONDS
        lines.show(ranks)
    line = "1 ranks up, replica a rank 1: weights, 1.0 of 2.0 GiB"
    assert said == ["starting Ray", "  5 s: no rank yet", f"  10 s: {line}", f"  30 s: {line}"]
    said.clear()
    now[0] = 40.0
    lines.show([at("b", UP), at("a", Stage("warmup"), 1, alone=False)])
    lines.show([at("b", UP), at("a", Stage("graphs"), 1, alone=False)])
    assert said == ["  40 s: 1 ranks up, replica a rank 1: warmup"]
    now[0] += LINE_SECONDS
    lines.show([at("b", UP), at("a", UP, 1, alone=False)])
    lines.show([at(f"r{n}", Stage("imports")) for n in range(MOST_SHOWN + 7)])
    assert len(said) == 2
    assert said[1].endswith("; and 7 more")


def test_on_a_terminal_each_rank_has_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with start_view(console, print) as view:
        assert isinstance(view, Bars)
        view.say("starting Serve")
        view.show([at("b", UP), at("a", Stage("weights", GB, 4 * GB, BYTES))])
        view.show([at("a", Stage("weights", 2 * GB, 4 * GB, BYTES)), at("c", Stage("imports"))])
        tasks = {task.description: task for task in view._progress.tasks}
        assert list(tasks) == ["starting Serve ...", "  replica a: weights", "  replica c: imports"]
        assert tasks["  replica a: weights"].percentage == 50.0
        assert tasks["  replica a: weights"].fields["count"] == "2.0 of 4.0 GiB"
        assert tasks["  replica c: imports"].percentage == 0.0
        view.show([at("a", UP), at("c", Stage("imports"))])
        assert [task.percentage for task in view._progress.tasks[1:]] == [100.0, 0.0]
        view.show([at(str(n), Stage("imports")) for n in range(2 * MOST_SHOWN)])
        assert len(view._progress.tasks) == 1 + MOST_SHOWN
        view._progress.refresh()
    assert "starting Serve" in out.getvalue()
