"""Replicas whose steps the policy orders: room that lower tiers yield, heads in the engines, charges step by step."""

from __future__ import annotations

import pytest

from router.dispatch.lease import Granted, Outcome, Settle
from router.qos.file import make_qos_config
from router.qos.source import parse_source
from workers.api.ordering import Service, ServiceReport
from workers.api.replica import LoadReport

from .test_dispatch_by_qos import TIERS, Site
from .virtual import info

CHEAP, OTHER, VIP = ("Bronze", "cheap"), ("Bronze", "other"), ("Platinum", "vip")


def row(key: tuple[str, str], prefill: int, decode: int, waiting: int = 0, time: float = 0.0) -> Service:
    return Service(key, prefill, decode, 0, prefill + 2.0 * decode, time, waiting)


def tell(site: Site, *rows: Service, overhead: int = 0, replica: str = "r0", whole: bool = False) -> None:
    executed = overhead + sum(r.prefill + r.decode for r in rows)
    site.take(site.dispatcher.service(replica, ServiceReport(executed, overhead, rows, whole)))


def tiered(slots: int = 2, replicas: int = 1) -> Site:
    site = Site(TIERS, slots=slots, replicas=replicas)
    for i in range(replicas):
        tell(site, replica=f"r{i}", whole=True)
    return site


def test_a_higher_tier_takes_room_that_a_lower_one_holds() -> None:
    site = tiered(slots=2)
    for _ in range(2):
        site.submit("cheap")
    site.submit("vip")
    site.submit("vip")
    assert site.order == ["cheap", "cheap", "vip", "vip"]
    site.submit("vip")  # what is left is held by its own tier
    assert len(site.order) == 4


def test_where_engines_do_not_order_steps_nobody_takes_what_is_held() -> None:
    site = Site(TIERS, slots=2)
    for owner in ("cheap", "cheap", "vip"):
        site.submit(owner)
    assert site.order == ["cheap", "cheap"]


def test_tiers_switched_off_and_on_again() -> None:
    """Meanwhile nobody yields, and what is executed is nobody's.

    Mutants seen to fail: a replica that stays tiered; reports dropped, so that it never is again.
    """
    site = tiered(slots=1)
    tell(site, row(CHEAP, 10, 0))
    site.submit("cheap")
    on = site.dispatcher.qos
    site.dispatcher.reload(make_qos_config(parse_source(TIERS + "\nenable_user_qos: false", "f", as_json=False)))
    site.submit("vip")
    tell(site, row(CHEAP, 50, 0))
    assert site.order == ["cheap"]
    site.take(site.dispatcher.reload(on))
    assert site.order == ["cheap"]
    tell(site, row(CHEAP, 60, 0))
    assert site.order == ["cheap", "vip"]
    ledger = site.dispatcher._registry.fleet("m").queue.policy.ledger
    assert (ledger.executed, ledger.missing) == (10, 0)


def test_free_room_is_taken_before_anybody_has_to_yield() -> None:
    site = tiered(slots=1, replicas=2)
    held_by = site.dispatcher._leases.by_id[site.submit("cheap")].replica_id
    free = "r1" if held_by == "r0" else "r0"
    site.dispatcher.load(
        free, LoadReport(1, 0.01, decode_tokens=1, prefill_backlog=10**6, total_blocks=9, free_blocks=9)
    )
    lease = site.dispatcher._leases.by_id[site.submit("vip")]
    assert (lease.replica_id, lease.seat.account) == (free, VIP)


def test_each_account_has_one_head_in_each_engine() -> None:
    site = tiered(slots=1)
    for _ in range(4):
        site.submit("cheap")
        site.submit("other")
    assert site.order == ["cheap"]
    tell(site, row(CHEAP, 1, 0))
    assert sorted(site.order[1:]) == ["cheap", "other"]
    tell(site, row(CHEAP, 2, 0, waiting=1), row(OTHER, 0, 0, waiting=1))
    assert len(site.order) == 3
    site.clock.now += 1.0
    tell(site, row(CHEAP, 2, 1, waiting=0), row(OTHER, 0, 0, waiting=1))  # it was admitted: the next one may come
    assert site.order[3:] == ["cheap"]


def test_a_head_holds_no_slot_until_it_runs() -> None:
    site = tiered(slots=1)
    first = site.submit("cheap")
    for _ in range(3):
        site.submit("cheap")
    tell(site, row(CHEAP, 1, 0))
    replica = site.dispatcher._registry.replicas["r0"]
    assert (len(site.order), replica.free_slots) == (2, 0)
    site.take(site.dispatcher.settle(Settle(first, Outcome.COMPLETED, 10, 20, 0, 20)))
    assert len(site.order) == 3  # the slot is given away; who enters first is for the engine to say
    site.clock.now += 1.0
    tell(site, row(CHEAP, 20, 20, waiting=0))  # both run: one of them beyond what was counted on
    assert replica.free_slots == -1
    assert (len(site.order), list(replica.heads)) == (4, [CHEAP])
    for name in list(site.dispatcher._leases.by_id):
        site.take(site.dispatcher.cancel(name))
    assert (replica.slots, replica.head_slots, replica.blocks, replica.head_blocks, replica.by_rank) == (0, 0, 0, 0, {})
    assert site.dispatcher.ledger().balanced


def test_service_is_charged_as_reported_and_the_bill_changes_nothing() -> None:
    site = tiered(slots=1)
    name = site.submit("cheap", prompt=100, output=10)
    standing = site.queue.policy.standing(site.queue.policy.config.account("cheap"))
    expected = standing.pending
    tell(site, row(CHEAP, 100, 4), overhead=7)
    assert standing.service == 108.0
    assert standing.pending == pytest.approx(expected - 108.0)
    tell(site, row(CHEAP, 100, 10), overhead=7)  # totals since the start
    site.take(site.dispatcher.settle(Settle(name, Outcome.COMPLETED, 100, 10, 0, 10)))
    assert (standing.service, standing.resident) == (120.0, 0)
    assert standing.pending == pytest.approx(0.0, abs=1e-6)
    ledger = site.queue.policy.ledger
    assert (ledger.executed, ledger.overhead, ledger.missing) == (117, 7, 0)


def test_a_replica_that_comes_back_is_not_charged_twice() -> None:
    site = tiered()
    tell(site, row(CHEAP, 50, 0))
    site.dispatcher.replica_down("r0")
    site.dispatcher.replica_up(info("r0", slots=2, blocks=100_000))
    tell(site, row(CHEAP, 60, 0), whole=True)
    assert site.queue.policy.ledger.accounts[CHEAP].prefill == 60


def test_the_work_of_all_replicas_is_told_by_tier() -> None:
    site = tiered(replicas=2)
    tell(site, row(CHEAP, 5, 1), row(VIP, 7, 2), overhead=3)
    tell(site, row(CHEAP, 4, 0), row(OTHER, 1, 1), overhead=2, replica="r1")
    tell(site, row(CHEAP, 6, 0), overhead=2, replica="r1")  # totals: two prefill tokens more, and no overhead
    site.dispatcher.replica_down("r1")
    told = {(w.tier, w.kind): w.tokens for w in site.dispatcher.work()}
    assert told["Bronze", "prefill"] == 5 + 6 + 1
    assert told["Bronze", "decode"] == 1 + 1
    assert (told["Platinum", "prefill"], told["Platinum", "decode"], told["", "overhead"]) == (7, 2, 5)


def test_a_new_dispatcher_hears_of_all_service_and_of_the_lifts() -> None:
    site = Site(TIERS, replicas=2)
    tell(site, row(CHEAP, 100, 0, time=50.0))
    standing = site.queue.policy.standing(site.queue.policy.config.account("cheap"))
    assert standing.service == 0.0  # not before it has said all
    tell(site, row(CHEAP, 100, 0, time=50.0), whole=True)
    tell(site, row(CHEAP, 300, 0, time=54.0), replica="r1", whole=True)
    assert (standing.service, standing.time) == (400.0, 104.0)


def test_replicas_are_told_where_the_cluster_stands() -> None:
    site = tiered(replicas=2)
    tell(site, row(CHEAP, 100, 0))
    syncs = dict(site.dispatcher.service_syncs())
    times = {i: [(s.key, s.time, s.units) for s in sync.accounts if s.key == CHEAP] for i, sync in syncs.items()}
    assert times == {"r0": [(CHEAP, 1.0, 100.0)], "r1": [(CHEAP, 1.0, 0.0)]}  # 100 units / quota 50 / 2 replicas
    assert site.dispatcher.service_syncs() == []
    tell(site, row(OTHER, 10, 0), replica="r1")
    assert {i: [s.key for s in sync.accounts] for i, sync in site.dispatcher.service_syncs()} == {
        "r0": [OTHER],
        "r1": [OTHER],
    }


def test_a_head_is_a_lease_like_others() -> None:
    site = tiered(slots=1)
    for _ in range(3):
        site.submit("cheap")
    tell(site, row(CHEAP, 1, 0))
    assert len(site.order) == 2
    for name in list(site.dispatcher._leases.by_id):
        site.take(site.dispatcher.cancel(name))
    assert isinstance(site.dispatcher._leases.by_id[f"cheap#{3}"].granted, float)
    assert not site.dispatcher._registry.replicas["r0"].heads
    assert site.dispatcher.ledger().balanced
    assert all(not isinstance(r, Granted) for r in site.refused)
