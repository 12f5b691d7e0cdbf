"""Which replica is chosen, on clusters of known speeds. `test_fault_proxy_*` are the faults of LMDeploy's proxy."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Granted
from router.dispatch.strategies import STRATEGIES
from workers.api.replica import LoadReport

from .virtual import Clock, ask, decode_steps, done, info, made, replica_of


def teach(d: Dispatcher, clock: Clock, replica_id: str, *, speed: float, first: int = 0) -> None:
    """Idle again, after steps that took 0.1 s / speed and prefills at 1000 tokens/s x speed."""
    for report in decode_steps(0.1 / speed, first=first):
        d.load(replica_id, report)
    prefill = LoadReport(first + 10, 0.1 / speed + 1.0 / speed, prefill_tokens=1000, running=1)
    d.load(replica_id, prefill)
    clock.now += 0.1
    d.load(replica_id, LoadReport(first + 11))


def cluster(strategy: str, speeds: dict[str, float], *, slots: int = 64) -> tuple[Dispatcher, Clock]:
    d, clock = made(DispatcherConfig(strategy=strategy, recovery=0.0, suspect_after=1e9), seed=3)
    for name, speed in speeds.items():
        d.replica_up(info(name, slots=slots, blocks=10_000))
        teach(d, clock, name, speed=speed)
    return d, clock


def test_fault_proxy_of_two_idle_replicas_the_faster_is_taken() -> None:
    for order in ({"slow": 1.0, "fast": 100.0}, {"fast": 100.0, "slow": 1.0}):
        d, _ = cluster("min_expected_latency", order)
        assert replica_of(d.acquire("i", ask())) == "fast"


def test_fault_proxy_the_new_request_is_counted_so_a_speed_of_100_takes_a_burst() -> None:
    """Dividing only the requests that are there by speed splits idle nodes evenly."""
    d, _ = cluster("min_expected_latency", {"slow": 1.0, "fast": 100.0})
    taken = Counter(replica_of(d.acquire("i", ask())) for _ in range(20))
    assert taken == {"fast": 20}


def test_given_speeds_are_believed_before_anything_was_measured() -> None:
    d, _ = made()
    d.replica_up(info("slow"), speed=10.0)
    d.replica_up(info("fast"), speed=1000.0)
    assert replica_of(d.acquire("i", ask())) == "fast"


def test_fault_proxy_a_long_prompt_is_not_a_short_one() -> None:
    """One request each, but 50k tokens of prefill stand before one of them."""
    d, _ = cluster("min_expected_latency", {"a": 1.0, "b": 1.0})
    d.load("a", LoadReport(50, prefill_backlog=50_000, running=1))
    d.load("b", LoadReport(50, prefill_backlog=50, running=1))
    assert replica_of(d.acquire("i", ask())) == "b"


def test_a_grant_counts_before_the_engine_reports_it() -> None:
    d, _ = made(DispatcherConfig(recovery=0.0))
    for name in ("a", "b"):
        d.replica_up(info(name, slots=4, context=100_000, blocks=10_000), speed=1000.0)
    first = replica_of(d.acquire("i", ask(prompt=20_000)))
    assert first not in {replica_of(d.acquire("i", ask(prompt=10))) for _ in range(3)}


def test_a_new_replica_is_tried_at_once() -> None:
    d, clock = cluster("min_expected_latency", {"old": 2.0})
    d.replica_up(info("new", slots=64, blocks=10_000))
    clock.now += 0.1
    d.tick()
    assert "new" in {replica_of(d.acquire("i", ask())) for _ in range(3)}


def test_a_replica_that_turns_slow_is_left_and_tried_again() -> None:
    d, clock = cluster("min_expected_latency", {"a": 4.0, "b": 3.0})
    assert replica_of(d.acquire("i", ask("probe"))) == "a"
    slowed = list(decode_steps(10 * 0.1 / 4.0, first=100, steps=6))
    for report in slowed:  # six steps of a quarter second
        clock.now += report.step_seconds
        d.load("a", report)
    assert replica_of(d.acquire("i", ask("next"))) == "b"
    d.settle(done("probe"))
    d.settle(done("next"))
    for step in range(60):  # half a minute in which nobody asked
        clock.now += 0.5
        d.load("a", LoadReport(200 + step))
        d.load("b", LoadReport(200 + step))
        d.tick()
    chosen = {replica_of(d.acquire("i", ask())) for _ in range(4)}
    assert "a" in chosen


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_speeds_1_2_4(strategy: str) -> None:
    """A closed loop of 12 requests on replicas that serve each request in 4, 2 and 1 s, whatever runs beside it."""
    d, clock = cluster(strategy, {"x1": 1.0, "x2": 2.0, "x4": 4.0})
    seconds = {"x1": 4.0, "x2": 2.0, "x4": 1.0}
    ends: list[tuple[float, str]] = []
    taken: Counter[str] = Counter()
    for number in range(300):
        if len(ends) >= 12:
            clock.now, ended = heapq.heappop(ends)
            d.settle(done(ended, output=64))
        answer = d.acquire("i", ask(f"{number}"))
        assert isinstance(answer, Granted)
        replica = answer.replica.id
        taken[replica] += 1
        heapq.heappush(ends, (clock.now + seconds[replica], str(number)))
    assert d.ledger().balanced
    if strategy == "round_robin":
        assert set(taken.values()) == {100}
    elif strategy == "random":
        for name, share in (("x1", 1 / 7), ("x2", 2 / 7), ("x4", 4 / 7)):
            assert taken[name] / 300 == pytest.approx(share, abs=0.08)
    elif strategy == "power_of_two":
        assert taken["x4"] > taken["x2"] > taken["x1"] > 0
    elif strategy == "min_observed_latency":
        assert taken["x4"] > taken["x2"] >= taken["x1"] > 0
    else:
        assert taken["x4"] > 200  # nothing here says that the fast one slows down with its batch


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_same_seed_same_choices(strategy: str) -> None:
    def choices() -> list[str]:
        d, _ = cluster(strategy, {f"r{i}": 1.0 + i for i in range(5)})
        return [replica_of(d.acquire("i", ask(prompt=10 + i))) for i in range(50)]

    assert choices() == choices()


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_fault_proxy_no_node_is_no_crash(strategy: str) -> None:
    d, clock = made(DispatcherConfig(strategy=strategy, recovery=0.0))
    assert d.acquire("i", ask("1")) is None
    clock.now += 100.0
    (reply,) = d.tick()
    assert "no replica of m came up" in reply.message.message  # type: ignore[union-attr]


def test_fault_proxy_min_observed_latency_tries_the_unseen_once_then_compares() -> None:
    d, clock = made(DispatcherConfig(strategy="min_observed_latency", recovery=0.0, suspect_after=1e9))
    for name in ("a", "b"):
        d.replica_up(info(name))
    first, second = replica_of(d.acquire("i", ask("1"))), replica_of(d.acquire("i", ask("2")))
    assert {first, second} == {"a", "b"}
    clock.now += 1.0
    d.settle(done("1"))
    clock.now += 9.0
    d.settle(done("2"))
    assert {replica_of(d.acquire("i", ask())) for _ in range(3)} == {first}


def test_random_draws_come_from_the_given_generator() -> None:
    clock = Clock()
    d = Dispatcher(DispatcherConfig(strategy="random", recovery=0.0), clock=clock, rng=random.Random(1))
    for i in range(4):
        d.replica_up(info(f"r{i}", slots=64, blocks=10_000))
    assert len({replica_of(d.acquire("i", ask())) for _ in range(40)}) == 4
