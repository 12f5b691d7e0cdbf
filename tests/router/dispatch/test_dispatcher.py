"""The pure dispatcher: grants, refusals, order, losses, restarts."""

from __future__ import annotations

import pytest

from router.dispatch.dispatcher import DispatcherConfig, Reply
from router.dispatch.lease import Granted, HeldLease, LeaseLost, Outcome, Refusal, Refused, ReplicaState, Reregister
from router.dispatch.scaling import FleetLoad
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport

from .virtual import ask, done, info, made, replica_of


def ids(replies: list[Reply]) -> list[str]:
    return [r.message.lease_id for r in replies]


def refusal(answer: object) -> Refusal:
    assert isinstance(answer, Refused)
    return answer.reason


def test_grant_wait_settle() -> None:
    d, clock = made()
    d.replica_up(info("a", slots=2))
    assert replica_of(d.acquire("i", ask("1"))) == "a"
    assert replica_of(d.acquire("i", ask("2"))) == "a"
    assert d.acquire("j", ask("3")) is None
    clock.now += 1.5
    (reply,) = d.settle(done("1"))
    assert reply.client == "j"
    assert isinstance(reply.message, Granted)
    assert reply.message.waited_seconds == pytest.approx(1.5)
    assert d.ledger().balanced


def test_n_choices_take_n_slots_and_a_large_head_is_not_overtaken() -> None:
    d, _ = made()
    d.replica_up(info("a", slots=4))
    d.acquire("i", ask("1", choices=3))
    assert d.acquire("i", ask("big", choices=4)) is None
    assert d.acquire("i", ask("small")) is None  # one slot is free, but the head comes first
    assert ids(d.settle(done("1"))) == ["big"]
    assert ids(d.settle(done("big"))) == ["small"]


def test_blocks_bound_leases_too() -> None:
    d, _ = made(DispatcherConfig(recovery=0.0, decode_margin=16))
    d.replica_up(info("a", slots=100, blocks=10))
    assert replica_of(d.acquire("i", ask("1", prompt=100))) == "a"  # 7 blocks and 1 of margin
    assert d.acquire("i", ask("2", prompt=32)) is None
    assert ids(d.settle(done("1"))) == ["2"]


def test_blocks_that_the_engine_reports_as_used_count() -> None:
    d, _ = made()
    d.replica_up(info("a", blocks=100))
    d.load("a", LoadReport(1, free_blocks=1, total_blocks=100))
    assert d.acquire("i", ask("1")) is None
    assert ids(d.load("a", LoadReport(2, free_blocks=50, total_blocks=100))) == ["1"]


def test_a_request_that_just_fits_is_not_kept_out_by_its_margin() -> None:
    d, _ = made()
    d.replica_up(info("a", blocks=10))
    assert replica_of(d.acquire("i", ask("1", prompt=160))) == "a"


@pytest.mark.parametrize(
    ("request_fields", "reason"),
    [
        ({"prompt": 4096}, Refusal.CONTEXT),
        ({"choices": 5}, Refusal.INVALID),
        ({"prompt": 1700}, Refusal.INVALID),
        ({"model": "other"}, Refusal.UNKNOWN_MODEL),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_fields: dict[str, object], reason: Refusal) -> None:
    d, _ = made()
    d.replica_up(info("a"))
    assert refusal(d.acquire("i", ask(**request_fields))) == reason  # type: ignore[arg-type]
    assert d.ledger().balanced


def test_unlike_replicas_get_only_what_fits_them() -> None:
    d, _ = made()
    d.replica_up(info("short", context=100))
    d.replica_up(info("narrow", slots=2))
    assert replica_of(d.acquire("i", ask(prompt=500))) == "narrow"
    assert replica_of(d.acquire("i", ask(prompt=50, choices=3))) == "short"
    assert refusal(d.acquire("i", ask(prompt=500, choices=3))) == Refusal.INVALID


def test_queue_is_bounded_but_not_for_accepted_work() -> None:
    d, _ = made(DispatcherConfig(recovery=0.0, max_waiting=2))
    d.replica_up(info("a", slots=1))
    for _ in range(3):
        d.acquire("i", ask())
    answer = d.acquire("i", ask())
    assert refusal(answer) == Refusal.OVERLOADED
    assert isinstance(answer, Refused)
    assert 1.0 <= answer.retry_after <= 60.0
    assert d.acquire("i", ask(accepted=True)) is None
    assert d.waiting == 3


def test_no_replica_waits_for_the_grace_and_then_is_refused() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, models=("m",), replica_grace=5.0, replay_grace=30.0))
    assert d.acquire("i", ask("new")) is None
    assert d.acquire("i", ask("replay", accepted=True)) is None
    clock.now += 4.9
    assert d.tick() == []
    clock.now += 0.2
    (reply,) = d.tick()
    assert (ids([reply]), refusal(reply.message)) == (["new"], Refusal.NO_REPLICA)
    assert ids(d.replica_up(info("a"))) == ["replay"]
    assert d.ledger().balanced


def test_grace_counts_from_the_loss_of_the_last_replica() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, replica_grace=5.0))
    d.replica_up(info("a", slots=1))
    d.acquire("i", ask("runs"))
    d.acquire("i", ask("waits"))
    clock.now += 100.0
    d.replica_down("a")
    assert d.tick() == []
    clock.now += 5.0
    assert ids(d.tick()) == ["waits"]


def test_requests_wait_as_long_as_a_replica_is_expected() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, models=("m", "other"), replica_grace=5.0))
    assert d.acquire("i", ask("waits")) is None
    assert d.acquire("i", ask("nobody comes", model="other")) is None
    for _ in range(4):  # an upgrade says so again and again
        d.expect("m", 15.0)
        clock.now += 10.0
        d.tick()
    assert d.waiting_by_model == (("m", 1), ("other", 0))
    assert ids(d.replica_up(info("a"))) == ["waits"]
    d.replica_down("a")
    assert d.acquire("i", ask("waits too")) is None
    clock.now += 10.1
    assert ids(d.tick()) == ["waits too"], "nobody has said so for 15 s"
    assert d.ledger().balanced


def test_lost_leases_are_reported_once() -> None:
    d, _ = made()
    d.replica_up(info("a"))
    d.acquire("i", ask("1"))
    d.acquire("j", ask("2", choices=2))
    replies = d.replica_down("a", "killed")
    assert [(r.client, r.message) for r in replies] == [
        ("i", LeaseLost("1", "a", "killed", True)),
        ("j", LeaseLost("2", "a", "killed", True)),
    ]
    assert d.replica_down("a") == []
    assert d.settle(done("1")) == []
    ledger = d.ledger()
    assert ledger.balanced
    assert (ledger.lost, ledger.late, ledger.held) == (2, 1, 0)


def test_a_replay_goes_before_those_who_came_later() -> None:
    d, clock = made()
    d.replica_up(info("a", slots=1))
    d.acquire("i", ask("runs"))
    d.acquire("i", ask("young"))
    clock.now += 1.0
    d.acquire("i", ask("replay", accepted=True, age=30.0))
    assert ids(d.settle(done("runs"))) == ["replay"]


def test_excluded_replica_is_avoided_while_there_is_another() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, exclusion_grace=2.0, suspect_after=1e9))
    d.replica_up(info("a"))
    d.replica_up(info("b", slots=1))
    assert replica_of(d.acquire("i", ask("1", excluded=("a",)))) == "b"
    assert d.acquire("i", ask("2", excluded=("a",))) is None
    assert replica_of(d.acquire("i", ask("3", age=50.0))) == "a"
    clock.now += 10.0
    assert d.tick() == []  # b is there, though full
    d.replica_down("b")
    assert ids(d.tick()) == ["2"]  # nobody else is left
    assert d.ledger().balanced


def test_a_head_held_back_by_its_exclusions_does_not_block_others() -> None:
    d, _ = made()
    d.replica_up(info("a", slots=1))
    d.replica_up(info("b", slots=1))
    d.acquire("i", ask("1", excluded=("b",)))
    d.acquire("i", ask("2", excluded=("a",)))
    assert d.acquire("i", ask("stuck", excluded=("a",))) is None
    assert d.acquire("i", ask("free")) is None
    assert ids(d.settle(done("1"))) == ["free"]
    assert ids(d.settle(done("2"))) == ["stuck"]


def test_cancelled_waiters_are_skipped_and_a_cancelled_lease_frees_its_room() -> None:
    d, _ = made()
    d.replica_up(info("a", slots=1))
    for name in ("1", "2", "3"):
        d.acquire("i", ask(name))
    assert d.cancel("2") == []
    assert ids(d.cancel("1")) == ["3"]
    assert d.cancel("1") == []
    ledger = d.ledger()
    assert (ledger.cancelled, ledger.late) == (2, 1)
    assert ledger.balanced


def test_cancelling_a_blocking_head_lets_others_go() -> None:
    d, _ = made()
    d.replica_up(info("a", slots=4))
    d.acquire("i", ask("1", choices=2))
    d.acquire("i", ask("head", choices=4))
    d.acquire("i", ask("small", choices=2))
    assert ids(d.cancel("head")) == ["small"]


def test_draining_gets_nothing_new() -> None:
    d, _ = made()
    d.replica_up(info("a"))
    d.acquire("i", ask("1"))
    assert d.drain("a") == 1
    assert d.acquire("i", ask("2")) is None
    assert ids(d.replica_up(info("b"))) == ["2"]
    d.settle(done("1"))
    assert d.drain("a") == 0
    assert d.drain("unknown") == 0
    assert {r.info.id: r.state for r in d.rows()} == {"a": ReplicaState.DRAINING, "b": ReplicaState.READY}


def test_a_drained_replica_does_not_wait_for_clients_that_are_gone() -> None:
    d, _ = made()
    d.replica_up(info("a"))
    d.acquire("here", ask("1"))
    d.acquire("gone", ask("2"))
    assert d.drain("a") == 2
    d.client_gone("gone")
    assert d.drain("a") == 1
    d.reregister("gone", Reregister(held=(HeldLease(ask("2"), "a"),)))
    assert d.drain("a") == 2


def test_the_load_of_a_fleet_counts_who_takes_leases() -> None:
    d, _ = made()
    assert d.fleet_load("m") == FleetLoad()
    for name in "ab":
        d.replica_up(info(name, slots=2))
    for number in range(3):
        d.acquire("i", ask(str(number)))
    load = d.fleet_load("m")
    assert (load.ready, load.waiting, load.busy) == (2, 0, 0.75)
    d.acquire("i", ask("3"))
    d.acquire("i", ask("4"))
    full = d.fleet_load("m")
    assert (full.ready, full.waiting, full.busy) == (2, 1, 1.0)
    assert full.wait_seconds > load.wait_seconds
    d.drain("a")
    assert d.fleet_load("m").ready == 1
    assert d.fleet_load("m").wait_seconds > full.wait_seconds  # the same queue for half of the slots
    assert d.fleet_load("another") == FleetLoad()


def test_no_progress_makes_suspect_and_progress_makes_ready() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=2.0))
    d.replica_up(info("a"))
    d.load("a", LoadReport(5, 0.01, decode_tokens=1, running=1))
    clock.now += 2.1
    d.load("a", LoadReport(5, 0.01, decode_tokens=1, running=1))  # it speaks, but its step number stands still
    d.tick()
    assert d.rows()[0].state is ReplicaState.SUSPECT
    assert d.acquire("i", ask("1")) is None
    assert ids(d.load("a", LoadReport(6, 0.01, decode_tokens=1, running=1))) == ["1"]
    assert d.rows()[0].state is ReplicaState.READY


def test_an_idle_replica_that_reports_is_not_suspect() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, suspect_after=2.0))
    d.replica_up(info("a"))
    for _ in range(10):
        clock.now += 0.5
        d.load("a", LoadReport(5))
        d.tick()
    assert d.rows()[0].state is ReplicaState.READY


def test_an_ingress_that_lost_a_replica_makes_it_suspect() -> None:
    d, _ = made()
    d.replica_up(info("a"))
    d.replica_up(info("b"))
    first = replica_of(d.acquire("i", ask("1")))
    d.settle(done("1", outcome=Outcome.LOST))
    assert {r.info.id: r.state for r in d.rows()}[first] is ReplicaState.SUSPECT
    assert replica_of(d.acquire("i", ask("2"))) != first


def test_ingress_gone_for_good_and_ingress_that_comes_back() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, orphan_grace=5.0, suspect_after=1e9))
    d.replica_up(info("a", slots=2))
    d.acquire("gone", ask("1"))
    d.acquire("back", ask("2"))
    d.acquire("gone", ask("3"))
    d.acquire("other", ask("4"))
    d.client_gone("gone")
    d.client_gone("back")
    assert d.waiting == 1
    clock.now += 4.0
    d.reregister("back", Reregister(held=(HeldLease(ask("2"), "a"),)))
    assert d.tick() == []
    clock.now += 1.1
    assert ids(d.tick()) == ["4"]
    ledger = d.ledger()
    assert (ledger.held, ledger.cancelled) == (2, 2)
    assert ledger.balanced


def test_reregistration_is_complete() -> None:
    """A grant that never arrived ends; a wait that was never heard of begins; nothing is counted twice."""
    d, _ = made()
    d.replica_up(info("a", slots=2))
    d.acquire("i", ask("kept"))
    d.acquire("i", ask("answer lost"))
    d.client_gone("i")
    kept = ask("kept")
    replies = d.reregister("i", Reregister(held=(HeldLease(kept, "a"),), waiting=(ask("answer lost"), ask("new"))))
    assert ids(replies) == ["answer lost"]
    assert d.waiting == 1
    assert d.ledger().balanced


def test_a_restarted_dispatcher_takes_over_leases_before_replicas_are_there() -> None:
    d, _ = made()
    d.reregister("i", Reregister(held=(HeldLease(ask("1", choices=3), "a"),), waiting=(ask("2", choices=2),)))
    assert d.ledger().held == 1
    assert d.replica_up(info("a", slots=4)) == []  # 3 of 4 slots are taken
    assert ids(d.settle(done("1"))) == ["2"]
    assert d.ledger().balanced


def test_leases_taken_over_hold_their_blocks_too() -> None:
    d, _ = made()
    d.reregister("i", Reregister(held=(HeldLease(ask("1", prompt=1280), "a"),), waiting=(ask("2", prompt=320),)))
    assert d.replica_up(info("a", slots=4, blocks=100)) == []  # 80 blocks and a margin of 4 are taken
    assert ids(d.settle(done("1"))) == ["2"]


def test_leases_of_a_replica_that_never_came_back_are_lost() -> None:
    d, _ = made()
    d.reregister("i", Reregister(held=(HeldLease(ask("1"), "a"), HeldLease(ask("2"), "b"))))
    assert ids(d.replica_down("a", "not reachable")) == ["1"]
    assert ids(d.settle(done("2"))) == []
    assert d.ledger().balanced
    assert d.ledger().held == 0


def test_during_recovery_what_engines_run_counts_as_leased() -> None:
    """Ingress replicas that have not come back yet hold leases that a new dispatcher cannot know."""
    d, clock = made(DispatcherConfig(recovery=3.0))
    d.replica_up(info("a", slots=4))
    d.load("a", LoadReport(9, 0.01, decode_tokens=4, running=4))
    assert d.acquire("i", ask("1")) is None
    clock.now += 3.1
    d.load("a", LoadReport(10, 0.01, decode_tokens=4, running=4))
    assert ids(d.tick()) == ["1"]


def test_the_same_request_twice_is_one_lease() -> None:
    d, _ = made()
    d.replica_up(info("a", slots=1))
    d.acquire("i", ask("1"))
    assert replica_of(d.acquire("i", ask("1"))) == "a"
    assert d.acquire("i", ask("2")) is None
    assert d.acquire("i", ask("2")) is None
    assert (d.ledger().acquired, d.ledger().held, d.waiting) == (2, 1, 1)


def test_models_do_not_block_each_other() -> None:
    d, _ = made()
    d.replica_up(info("a", "m", slots=1))
    d.replica_up(info("b", "n", slots=1))
    d.acquire("i", ask())
    assert d.acquire("i", ask()) is None
    assert replica_of(d.acquire("i", ask(model="n"))) == "b"


def test_bad_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_waiting"):
        DispatcherConfig(max_waiting=0)
    with pytest.raises(ConfigError, match="strategy 'fastest' is not one of"):
        made(DispatcherConfig(strategy="fastest"))
