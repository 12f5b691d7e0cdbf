"""Mutation check: each defect is planted in policy, ledger or leases, and a test named below must fail for it.

Those of LMDeploy-QoS are among them. `tests/qos/test_guarantees.py` has the same for the order of engine steps, and
`test_watch.py` for the live metric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from router.dispatch.table import Replica
from router.qos.config import Account, QosConfig
from router.qos.fair_queue import FairQueue
from router.qos.floors import Floors
from router.qos.ledger import Prices
from router.qos.policy import Policy
from router.qos.standing import Standing

from . import test_dispatch_by_qos as tests

Patch = Callable[[pytest.MonkeyPatch], None]


def slot_returned_at_once(patch: pytest.MonkeyPatch) -> None:
    """When the answer begins, not when it ends."""
    add, remove = Replica.add, Replica.remove

    def leased(self: Replica, lease_id: str, lease: Any, prefill: int, now: float) -> None:
        add(self, lease_id, lease, prefill, now)
        self.slots -= lease.request.choices
        self.refresh(now)

    def ended(self: Replica, lease_id: str, now: float) -> None:
        self.slots += self.leases[lease_id].request.choices
        remove(self, lease_id, now)

    patch.setattr(Replica, "add", leased)
    patch.setattr(Replica, "remove", ended)


def quota_0_first(patch: pytest.MonkeyPatch) -> None:
    """usage / quota of a user with quota 0 is taken for 0."""
    take = Standing._take

    def taken(self: Standing, account: Account) -> None:
        take(self, account)
        if account.quota == 0.0:
            self.band, self.weight = 2 * account.tier.rank, 1e9

    patch.setattr(Standing, "_take", taken)


def charged_under_its_own_id(patch: pytest.MonkeyPatch) -> None:
    """A user without a line queues under `default`, and is an account of its own."""
    account = QosConfig.account

    def own(self: QosConfig, user: str, tier: str = "") -> Account:
        found = account(self, user, tier)
        return Account(found.tier, user, found.quota) if found.id == "default" else found

    patch.setattr(QosConfig, "account", own)


def flat_charges(patch: pytest.MonkeyPatch) -> None:
    """A request costs 100, whatever it is."""
    patch.setattr(Prices, "units", lambda self, *tokens: 100.0)


def charged_at_admission(patch: pytest.MonkeyPatch) -> None:
    """What was expected is charged, not what was executed."""
    ended = FairQueue.ended

    def as_expected(self: FairQueue[Any], item_id: str, *counts: int, **more: Any) -> None:
        held = self._leased.get(item_id)
        ended(self, item_id, *((round(held[1]), 0, 0) if held else counts), **more)

    patch.setattr(FairQueue, "ended", as_expected)


def lost_settlement(patch: pytest.MonkeyPatch) -> None:
    """What a lease was expected to cost stays with its account."""
    commit = Policy.commit
    patch.setattr(Policy, "commit", lambda self, executed, charges, provisional=None: commit(self, executed, charges))


def no_lift(patch: pytest.MonkeyPatch) -> None:
    """Who was idle claims what it did not use."""
    patch.setattr(Policy, "_lift", lambda self, standing: None)


def cancelled_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """Only leases that complete are charged."""
    ended = FairQueue.ended

    def free(self: FairQueue[Any], item_id: str, prefill: int = 0, decode: int = 0, *rest: int, **more: Any) -> None:
        ended(self, item_id, *((prefill, decode, *rest) if decode else ()), **more)

    patch.setattr(FairQueue, "ended", free)


def grants_uncounted(patch: pytest.MonkeyPatch) -> None:
    """A lease counts only once it has ended: until then its account keeps coming first."""
    patch.setattr(Policy, "expect", lambda self, standing, units: None)


def tier_by_request(patch: pytest.MonkeyPatch) -> None:
    """The tier that a request names counts more than its user's line."""
    account = QosConfig.account

    def named(self: QosConfig, user: str, tier: str = "") -> Account:
        found = account(self, user, tier)
        wanted = next((t for t in self.tiers if t.name == tier), found.tier)
        return Account(wanted, found.id, found.quota)

    patch.setattr(QosConfig, "account", named)


def unbounded_queue(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks may wait."""
    patch.setattr(FairQueue, "refusal", lambda self, item: None)


def floors_forgotten(patch: pytest.MonkeyPatch) -> None:
    """No tier is owed anything."""
    patch.setattr(Floors, "owed", lambda self, tier: 0.0)


def waits_forgotten(patch: pytest.MonkeyPatch) -> None:
    """`max_wait` is not looked at."""
    patch.setattr(FairQueue, "_overdue", lambda self: None)


def who_was_away_claims_nothing() -> None:
    """One account is served alone, another comes: from then on they share."""
    site = tests.Site(tests.TIERS, slots=1)
    for _ in range(200):
        site.submit("cheap")
    site.run(leases=100)
    for _ in range(60):
        site.submit("other")
    before = len(site.order)
    site.run(leases=60)
    assert 25 <= site.order[before:].count("other") <= 35


def a_burst_is_shared() -> None:
    """Sixteen slots come free at once."""
    site = tests.Site(tests.TIERS, slots=16)
    for _ in range(16):
        site.submit("vip")
    for _ in range(40):
        site.submit("cheap")
    for _ in range(40):
        site.submit("other")
    site.run(leases=16)
    assert abs(site.order[16:].count("cheap") - site.order[16:].count("other")) <= 2


def floor_is_kept() -> None:
    """Fault 12, by share."""
    tests.test_fault_12_the_lowest_tier_cannot_starve_where_that_is_asked("{min_share: 0.1}")


def wait_is_bounded() -> None:
    """Fault 12, by time."""
    tests.test_fault_12_the_lowest_tier_cannot_starve_where_that_is_asked("{max_wait: 0.5}")


CASES: list[tuple[Patch, Callable[[], None]]] = [
    (slot_returned_at_once, tests.test_fault_1_a_slot_is_given_back_at_the_end_not_when_the_stream_begins),
    (quota_0_first, tests.test_fault_2_quota_0_comes_last_in_its_tier),
    (charged_under_its_own_id, tests.test_fault_3_unlisted_users_are_charged_where_they_are_queued),
    (flat_charges, tests.test_fault_7_requests_cost_what_they_take),
    (charged_at_admission, tests.test_cancelled_work_is_charged_as_far_as_it_ran),
    (lost_settlement, tests.test_cancelled_work_is_charged_as_far_as_it_ran),
    (cancelled_for_nothing, tests.test_cancelled_work_is_charged_as_far_as_it_ran),
    (no_lift, who_was_away_claims_nothing),
    (grants_uncounted, a_burst_is_shared),
    (tier_by_request, tests.test_fault_8_no_tier_that_a_request_names_lifts_an_owner_with_a_line),
    (unbounded_queue, tests.test_fault_10_the_queue_is_bounded_and_the_disconnected_leave_it),
    (floors_forgotten, floor_is_kept),
    (waits_forgotten, wait_is_bounded),
]


@pytest.mark.parametrize("check", [who_was_away_claims_nothing, a_burst_is_shared], ids=lambda x: x.__name__)
def test_the_checks_of_this_file_hold(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("plant", "check"), CASES, ids=lambda x: x.__name__)
def test_each_planted_defect_is_caught(
    plant: Patch, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        check()
