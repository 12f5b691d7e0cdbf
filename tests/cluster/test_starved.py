"""A step is not held for hung while the machine gives it no processor."""

from __future__ import annotations

import threading

from cluster.starved import Delays, StepWatch, own_delays


class Machine:
    def __init__(self) -> None:
        self.delays: Delays = {"1": 5.0, "2": 7.0}

    def __call__(self) -> Delays:
        return dict(self.delays)


def test_time_without_a_processor_is_not_the_steps_own() -> None:
    machine = Machine()
    watch = StepWatch(machine)
    assert watch.age(0.5) == 0.5
    machine.delays["2"] += 9.0  # whichever thread the others wait for
    machine.delays["1"] += 1.0
    assert watch.age(10.5) == 1.5


def test_a_step_that_hangs_without_wanting_a_processor_grows_old() -> None:
    watch = StepWatch(Machine())
    assert [watch.age(wall) for wall in (1.0, 6.0, 11.0)] == [1.0, 6.0, 11.0]


def test_what_was_waited_before_a_step_does_not_excuse_it() -> None:
    machine = Machine()
    watch = StepWatch(machine)
    assert watch.age(1.0) == 1.0
    machine.delays["1"] += 30.0
    assert watch.age(0.5) == 0.5, "another step"
    assert watch.age(0.0) == 0.0
    machine.delays["1"] += 30.0
    assert watch.age(2.0) == 2.0


def test_the_kernel_has_a_number_for_each_thread() -> None:
    found = own_delays()
    assert str(threading.get_native_id()) in found
    assert all(waited >= 0.0 for waited in found.values())
