"""A replica that makes no step though it lives: its leases go elsewhere; one that is only slow keeps them."""

from __future__ import annotations

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import LeaseLost, ReplicaState
from workers.api.replica import LoadReport

from .virtual import Clock, ask, decode_steps, info, made, replica_of

STEP = 0.05


def two_replicas(step: float = STEP, **limits: float) -> tuple[Dispatcher, Clock, str]:
    """Both are known, and one has a lease: its id."""
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=2.5, **limits))
    for name in ("a", "b"):
        d.replica_up(info(name))
        for report in decode_steps(step):
            clock.now += step
            d.load(name, report)
    busy = replica_of(d.acquire("ingress", ask("1")))  # type: ignore[arg-type]
    d.load(busy, LoadReport(10, step, prefill_tokens=32, running=1, kv_tokens=32, planned_decode=1))
    return d, clock, busy


def passes(d: Dispatcher, clock: Clock, seconds: float, idle: str) -> list[LeaseLost]:
    """What `seconds` bring while `idle` alone reports."""
    lost = []
    for _ in range(round(seconds / 0.1)):
        clock.now += 0.1
        d.load(idle, LoadReport(10, STEP))
        lost += [reply.message for reply in d.tick()]
    assert all(isinstance(message, LeaseLost) for message in lost)
    assert d.ledger().balanced
    return lost  # type: ignore[return-value]


def test_leases_of_a_hung_replica_go_elsewhere_once_and_it_gets_no_more() -> None:
    d, clock, busy = two_replicas()
    other = {"a": "b", "b": "a"}[busy]
    assert passes(d, clock, 2.4, other) == []
    (lost,) = passes(d, clock, 0.4, other)
    assert (lost.lease_id, lost.replica_id, lost.died) == ("1", busy, True)
    assert d.ledger().lost == 1
    assert passes(d, clock, 5.0, other) == []
    assert replica_of(d.acquire("ingress", ask("2", excluded=(busy,), accepted=True))) == other  # type: ignore[arg-type]


def test_it_comes_to_itself_with_its_next_step() -> None:
    d, clock, busy = two_replicas()
    passes(d, clock, 3.0, {"a": "b", "b": "a"}[busy])
    d.load(busy, LoadReport(11, 3.0, decode_tokens=1))
    assert {row.state for row in d.rows()} == {ReplicaState.READY}


def test_a_slow_replica_keeps_its_leases() -> None:
    d, clock, busy = two_replicas(step=0.6)
    assert passes(d, clock, 5.0, {"a": "b", "b": "a"}[busy]) == []


def test_a_long_prompt_under_way_is_waited_for() -> None:
    d, clock, busy = two_replicas()
    slow = LoadReport(11, 1.0, prefill_tokens=100, running=1, kv_tokens=132)  # 10 ms a prompt token
    for number in range(20):
        clock.now += 1.0
        d.load(busy, slow.__class__(**{**fields(slow), "step": 11 + number}))
    d.load(busy, LoadReport(40, 1.0, prefill_tokens=100, running=1, kv_tokens=132, planned_prefill=200))
    assert passes(d, clock, 8.0, {"a": "b", "b": "a"}[busy]) == []


def test_where_there_is_nowhere_else_nothing_moves() -> None:
    d, clock, busy = two_replicas()
    other = {"a": "b", "b": "a"}[busy]
    d.drain(other)
    assert passes(d, clock, 10.0, other) == []
    assert d.ledger().held == 1


def fields(report: LoadReport) -> dict[str, object]:
    return {name: getattr(report, name) for name in report.__slots__}
