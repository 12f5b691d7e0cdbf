"""Expected latency against what then happens, on replicas whose steps are simulated.

Mutants seen to fail: no step under way; no lag; a late step without consequence, while it runs or afterwards; canaries
that teach nothing; an unmeasured replica not believed to be quick; no step between that under way and the own one.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Outcome, Settle
from workers.api.replica import LoadReport

from .virtual import ask, decode_steps, done, info, made, replica_of
from .virtual_engine import Run, VirtualEngine


def loaded(speeds: dict[str, float], *, rate: float, seconds: float, seed: int = 0) -> Run:
    """Requests of 50 to 4,000 tokens in and 5 to 60 out, `rate` a second; the caller lets time pass."""
    d, clock = made(DispatcherConfig(recovery=0.0), seed=seed)
    engines = [VirtualEngine(name, rate=8000 * s, base=0.02 / s, per_seq=0.001 / s) for name, s in speeds.items()]
    run = Run(d, clock, engines)
    rng, when, number = random.Random(seed), clock.now, 0
    while when < clock.now + seconds:
        when += rng.expovariate(rate)
        number += 1
        output = rng.randrange(5, 60)
        run.ask(when, ask(f"{number}", prompt=round(50 * 80 ** rng.random()), max_tokens=output), output)
    return run


@pytest.mark.parametrize("seed", range(2))
def test_first_tokens_come_when_they_were_predicted(seed: int) -> None:
    run = loaded({"a": 1.0, "b": 2.0, "c": 4.0}, rate=12.0, seconds=60.0, seed=seed)
    run.go(until=1100.0)
    learned = run.errors[len(run.errors) // 4 :]
    assert statistics.median(learned) < 0.1
    assert run.d.ledger().balanced


def test_a_replica_that_turns_slow_is_left_before_it_says_so_and_tried_again() -> None:
    run = loaded({"a": 1.0, "b": 2.0, "c": 4.0}, rate=12.0, seconds=60.0)

    def turn(slow: float) -> None:
        run.engines["c"].slow = slow

    run.at(1020.0, lambda: turn(10.0))
    run.at(1035.0, lambda: turn(1.0))
    run.go(until=1100.0)

    def share(begin: float, end: float) -> float:
        taken = [name for when, name in run.granted_at if begin <= when < end]
        return taken.count("c") / len(taken)

    assert share(1010.0, 1020.0) > 0.5
    assert share(1022.0, 1035.0) < 0.25
    assert share(1050.0, 1060.0) > 0.5


def test_a_new_replica_is_tried_within_a_second_under_load() -> None:
    run = loaded({"a": 4.0, "b": 4.0}, rate=10.0, seconds=20.0)
    run.at(1010.0, lambda: run.join(VirtualEngine("new", rate=32_000, base=0.005, per_seq=0.00025)))
    run.go(until=1050.0)
    assert min(when for when, name in run.granted_at if name == "new") < 1011.0


def test_a_step_that_is_late_counts_for_as_long_again() -> None:
    d, clock = made()
    d.replica_up(info("a"))
    for report in decode_steps(0.1):
        d.load("a", report)
    d.load("a", LoadReport(20, 0.1, decode_tokens=1, running=1, kv_tokens=100, planned_decode=1))
    replica = d._registry.replicas["a"]
    demand = d._granting._expectations.demand(ask(), clock.now)
    soon = replica.expected_first(demand)
    clock.now += 3.0
    d.tick()
    demand = d._granting._expectations.demand(ask(), clock.now)
    assert replica.expected_first(demand) > 3.0 + soon


def first_expected(d: Dispatcher) -> float:
    """Seconds to the first token of a request to replica `a`, by now."""
    return d._registry.replicas["a"].expected_first(d._granting._expectations.demand(ask(), d._clock()))


def test_a_step_that_is_late_says_that_the_next_one_is_too() -> None:
    d, clock = made()
    d.replica_up(info("a"))
    for report in decode_steps(0.1, steps=100):
        d.load("a", report)
    usual = first_expected(d)
    d.load("a", LoadReport(120, 0.1, decode_tokens=1, running=1, kv_tokens=100, planned_decode=1))
    clock.now += 1.0
    d.load("a", LoadReport(121, 1.0, decode_tokens=1, running=1, kv_tokens=100, planned_decode=1))
    assert first_expected(d) > 4.0 * usual  # at once, though nothing is late by now
    d.load("a", LoadReport(122, 0.1, decode_tokens=1, running=1, kv_tokens=100))
    assert first_expected(d) < 2.0 * usual


def test_a_canary_that_is_late_says_nothing_of_other_steps() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=1e9))
    d.replica_up(info("a"))
    for report in decode_steps(0.1):
        d.load("a", report)
    d.load("a", LoadReport(10))
    usual = first_expected(d)
    clock.now += 3.0
    assert d.canaries() == ["a"]
    d.load("a", LoadReport(11, 2.0, prefill_tokens=1))
    d.canary("a", well=True)
    assert first_expected(d) == pytest.approx(usual)


@pytest.mark.parametrize(("backlog", "steps"), [(0, 1.0), (512, 0.75), (4096, 0.0)])
def test_where_steps_are_planned_ahead_one_more_comes_first(backlog: int, steps: float) -> None:
    """As far as the prompts ahead, whose steps are counted by their tokens, do not fill it."""
    d, clock = made()
    d.replica_up(replace(info("a"), max_num_batched_tokens=2048))
    for report in decode_steps(0.1):
        d.load("a", report)
    load = LoadReport(20, 0.1, decode_tokens=1, running=1, kv_tokens=100, prefill_backlog=backlog)
    d.load("a", load)
    at_once = first_expected(d)
    d.load("a", replace(load, step=21, planned_decode=1))
    under_way = d._registry.replicas["a"].step_ends - clock.now
    assert under_way == pytest.approx(0.1, rel=0.05)
    assert first_expected(d) - at_once - under_way == pytest.approx(0.1 * steps, abs=0.01)


def test_a_quick_canary_ends_the_belief_in_a_slow_replica() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=1e9))
    for name, seconds in (("a", 1.0), ("b", 0.1)):
        d.replica_up(info(name))
        for report in decode_steps(seconds):
            d.load(name, report)
        d.load(name, LoadReport(10))
    assert replica_of(d.acquire("i", ask("1"))) == "b"
    d.settle(done("1"))
    clock.now += 3.0
    assert set(d.canaries()) == {"a", "b"}
    d.load("a", LoadReport(11, 0.02, prefill_tokens=1))
    d.load("b", LoadReport(11, 0.11, prefill_tokens=1))
    for name in "ab":
        d.canary(name, well=True)
    assert replica_of(d.acquire("i", ask("2"))) == "a"


def test_what_first_tokens_are_late_by_is_learned_by_its_median() -> None:
    d, clock = made()
    d.replica_up(info("a"))
    for report in decode_steps(0.1):
        d.load("a", report)
    for number in range(400):
        granted = d.acquire("i", ask(f"{number}"))
        d.load("a", LoadReport(20 + number))
        late = 50.0 if number % 10 == 0 else 0.05
        clock.now += 1.0
        first = granted.first_seconds - d._registry.replicas["a"].lag + late  # type: ignore[union-attr]
        d.settle(Settle(f"{number}", Outcome.COMPLETED, output_tokens=3, first_seconds=first))
    assert d._registry.replicas["a"].lag == pytest.approx(0.05, abs=0.01)


def test_a_first_request_that_met_a_cold_replica_is_not_held_against_it() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=1e9))
    for name, seconds in (("cold", 2.0), ("warm", 0.02)):
        d.replica_up(info(name))
        d.load(name, LoadReport(0))
        d.load(name, LoadReport(1, seconds, prefill_tokens=20))
        d.load(name, LoadReport(2))
    assert replica_of(d.acquire("i", ask("1"))) == "warm"
    d.settle(done("1"))
    clock.now += 3.0
    assert "cold" in d.canaries()
    d.load("cold", LoadReport(3, 0.005, prefill_tokens=1))
    d.canary("cold", well=True)
    assert replica_of(d.acquire("i", ask("2"))) == "cold"
