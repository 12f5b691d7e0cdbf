"""How many replicas there should be, under a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.dispatch.scaling import FleetLoad, Scaler, ScalingConfig
from workers.api.errors import ConfigError

CONFIG = ScalingConfig(
    min_replicas=1, max_replicas=4, target_wait=1.0, target_busy=0.7, up_after=5.0, down_after=30.0, cooldown=60.0
)
IDLE = FleetLoad(ready=1)


class Fleet:
    """Replicas that are there as soon as they are wanted, and a clock."""

    def __init__(self, config: ScalingConfig = CONFIG, wanted: int = 1) -> None:
        self.scaler, self.wanted, self.now = Scaler(config), wanted, 0.0

    def run(self, seconds: float, load: FleetLoad | None, *, ready: int | None = None) -> list[tuple[float, int]]:
        """(when, how many) of each change while `load` lasts."""
        changes = []
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            there = None if load is None else replace(load, ready=self.wanted if ready is None else ready)
            wanted = self.scaler.decide(self.now, self.wanted, there)
            if wanted != self.wanted:
                changes.append((self.now, wanted))
                self.wanted = wanted
        return changes


def short(wait: float) -> FleetLoad:
    return FleetLoad(waiting=20, wait_seconds=wait, busy=1.0)


def test_up_after_a_while_of_too_much_waiting() -> None:
    fleet = Fleet()
    assert fleet.run(4.5, short(1.5)) == []
    assert fleet.run(1.0, short(1.5)) == [(5.5, 2)]


def test_a_moment_of_waiting_changes_nothing() -> None:
    fleet = Fleet()
    for _ in range(10):
        assert fleet.run(4.5, short(9.0)) == []
        assert fleet.run(0.5, FleetLoad(busy=0.9)) == []


def test_a_long_wait_doubles_the_replicas_and_no_more() -> None:
    fleet = Fleet()
    assert [n for _, n in fleet.run(60.0, short(50.0))] == [2, 4]


def test_nothing_more_is_started_until_what_was_asked_for_is_up() -> None:
    fleet = Fleet()
    fleet.run(5.5, short(3.0))
    assert fleet.wanted == 2
    assert fleet.run(120.0, short(3.0), ready=1) == []
    assert fleet.run(6.0, short(3.0)) == [(fleet.now - 0.5, 4)]


def test_a_replica_that_is_starting_is_not_taken_away_unless_it_does_not_come() -> None:
    fleet = Fleet(replace(CONFIG, down_after=5.0, cooldown=0.0))
    assert fleet.run(5.5, short(1.5)) == [(5.5, 2)]
    assert fleet.run(110.0, FleetLoad(), ready=1) == []
    assert fleet.run(20.0, FleetLoad(), ready=1) == [(5.5 + 120.0 + 5.0, 1)]


def test_one_at_a_time_goes_after_a_while_and_after_the_cooldown() -> None:
    fleet = Fleet(wanted=3)
    assert fleet.run(200.0, FleetLoad()) == [(30.5, 2), (90.5, 1)]


def test_never_below_the_least_nor_above_the_most() -> None:
    config = replace(CONFIG, min_replicas=2, max_replicas=3)
    fleet = Fleet(config, wanted=2)
    assert [n for _, n in fleet.run(1000.0, short(100.0))] == [3]
    assert [n for _, n in fleet.run(1000.0, FleetLoad())] == [2]
    assert Scaler(config).decide(0.0, 1, IDLE) == 2
    assert Scaler(config).decide(0.0, 9, None) == 3


def test_between_the_two_bounds_nothing_moves() -> None:
    """Too short for fewer, at ease enough for no more: for ever."""
    for load in (FleetLoad(busy=0.8), FleetLoad(busy=0.1, wait_seconds=0.6), FleetLoad(busy=0.1, waiting=1)):
        assert Fleet(wanted=2).run(1000.0, load) == []


def test_those_that_stay_must_not_be_too_busy() -> None:
    assert Fleet(wanted=2).run(1000.0, FleetLoad(busy=0.36)) == []  # 0.72 of one
    assert [n for _, n in Fleet(wanted=2).run(1000.0, FleetLoad(busy=0.34))] == [1]


def test_load_that_comes_and_goes_does_not_swing_the_count() -> None:
    """Bursts of 10 s each 40 s: replicas are added once, and none goes while the next burst is near."""
    fleet = Fleet(replace(CONFIG, down_after=60.0))
    changes = []
    for _ in range(20):
        changes += fleet.run(10.0, short(1.5) if fleet.wanted == 1 else FleetLoad(busy=0.9))
        changes += fleet.run(30.0, FleetLoad(busy=0.05))
    assert changes == [(5.5, 2)]


def test_without_news_nothing_changes_and_the_waiting_begins_anew() -> None:
    fleet = Fleet()
    fleet.run(4.5, short(3.0))
    assert fleet.run(100.0, None) == []
    assert fleet.run(5.0, short(3.0)) == []
    assert fleet.run(1.0, short(3.0)) != []


def test_another_s_change_counts_for_the_cooldown() -> None:
    fleet = Fleet(wanted=3)
    fleet.run(29.0, FleetLoad())
    fleet.wanted = 4  # an operator's
    (first, *_) = fleet.run(200.0, FleetLoad())
    assert first == (29.5 + CONFIG.cooldown, 3)


@pytest.mark.parametrize(("least", "most"), [(0, 1), (3, 2)])
def test_bad_bounds_are_refused(least: int, most: int) -> None:
    with pytest.raises(ConfigError, match="min_replicas"):
        ScalingConfig(min_replicas=least, max_replicas=most)
