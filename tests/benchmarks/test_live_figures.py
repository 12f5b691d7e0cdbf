"""What the live programs make of what they saw: intervals and bounds, chunks, shares and gaps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live.figures import Figure, interval, median, single, write
from live.foretold import Foretold
from live.lies import requests
from live.shares import WINDOW, gap_and_shares
from live.site import _joined


@pytest.mark.parametrize(
    ("low", "high", "most", "missed"),
    [(1.0, 3.0, True, False), (2.1, 3.0, True, True), (1.0, 3.0, False, False), (1.0, 1.9, False, True)],
)
def test_a_bound_is_missed_where_the_interval_excludes_it(low: float, high: float, most: bool, missed: bool) -> None:
    assert Figure("x", 2.0, low, high, bound=2.0, most=most).missed is missed
    assert not Figure("x", 2.0, low, high, most=most).missed


def test_a_count_is_its_own_interval() -> None:
    assert single("escalations", 1, bound=0).missed
    assert not single("escalations", 0, bound=0).missed


def test_intervals_hold_the_median_and_are_the_same_each_time() -> None:
    values = [float(n % 17) for n in range(100)]
    middle, low, high = interval(values)
    assert low <= middle <= high
    assert low < high
    assert interval(values) == (middle, low, high)


def test_the_file_has_every_value(tmp_path: Path) -> None:
    write(tmp_path / "f.json", {"G1": [median("ttft", [1.0, 2.0, 4.0], "ms", 1.0)]})
    (row,) = json.loads((tmp_path / "f.json").read_text())["figures"]["G1"]
    assert (row["value"], row["values"], row["missed"]) == (2.0, [1.0, 2.0, 4.0], False)


def test_chunks_are_joined() -> None:
    assert _joined(b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n") == b"abc0123456789abcdef"


def test_shares_by_window_and_the_widest_drift() -> None:
    """`a` has 60 %; once it is 30 units ahead of that, and then even again."""
    rows, a, b = [], 0.0, 0.0
    for tick in range(int(3 * WINDOW) + 1):
        rows.append((float(tick), {"a": a + (30.0 if tick == 2 else 0.0), "b": b}))
        a, b = a + 60.0, b + 40.0
    gap, shares = gap_and_shares(rows, {"a": 60.0, "b": 40.0}, 0.0, 100.0)
    assert gap == pytest.approx(30.0 / 60.0 * 40.0)
    assert shares == pytest.approx([60.0] * 3)


def test_what_was_foretold() -> None:
    told = Foretold(1.0, 4.0, 8.0, lease=5.0, first=9.0)
    assert told.covers(told.lease)
    assert not told.covers(told.first)
    assert told.close(told.lease)  # within 30 % of 5 s
    assert not told.close(told.first)
    assert Foretold(0.0, 0.2, 0.5, lease=1.1, first=1.3).close(1.1)  # within a second


def test_every_spoof_has_a_name_and_is_there_once() -> None:
    names = [(one.path, one.what) for one in requests()]
    assert len(set(names)) == len(names) > 500
