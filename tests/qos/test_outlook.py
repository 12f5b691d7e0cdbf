"""How long a request will wait, by what became of predictions like it.

Mutants seen to fail: `outlook` asking all that is remembered; the oldest first among those as like.
"""

from __future__ import annotations

import pytest

from router.qos.outlook import Errors


def test_a_long_queue_teaches_little_of_a_short_one() -> None:
    """Of 1,000 that wait the first ones were served at once, as heads; later the queue is short, and keeps its word."""
    errors = Errors()
    for _ in range(180):
        errors.add(100.0, 1.0)
    for n in range(70):
        errors.add(2.0 + 0.01 * n, 2.0 * (2.0 + 0.01 * n))
    short = errors.outlook(20, 2.0)
    assert (short.low, short.middle, short.high) == pytest.approx((4.0 / 1.25, 4.0, 4.0 * 1.25))
    long = errors.outlook(1000, 100.0)
    assert long.middle == pytest.approx(1.0)


def test_of_like_ones_the_latest_count() -> None:
    errors = Errors()
    for _ in range(128):
        errors.add(3.0, 3.0)
    for _ in range(64):
        errors.add(3.0, 9.0)
    assert errors.outlook(5, 3.0).middle == pytest.approx(9.0)


def test_before_anything_is_known_the_interval_is_wide() -> None:
    errors = Errors()
    errors.add(0.0, 5.0)  # a prediction of nothing teaches nothing
    outlook = errors.outlook(3, 1.5)
    assert (outlook.position, outlook.low, outlook.middle, outlook.high) == (3, 0.0, 1.5, 6.0)


def test_the_interval_holds_nine_in_ten() -> None:
    errors = Errors()
    for n in range(64):
        errors.add(10.0, float(n))
    outlook = errors.outlook(7, 10.0)
    assert 1.25 * outlook.low == pytest.approx(3.0)
    assert outlook.high / 1.25 == pytest.approx(60.0)
