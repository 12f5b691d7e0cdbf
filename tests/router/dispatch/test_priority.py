"""`priority`: a user's own requests in the order that he likes, and nobody else's sooner or later for it.

Mutants seen to fail: all owners in one line, or all urgent requests of an account; the place kept by whoever is passed
(plain queue); the place's age that of the request, and the overdue request first, where `max_wait` looks at it.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.dispatch.lease import Granted

from .test_dispatch_by_qos import Site
from .virtual import ask, info, made

PLAIN = None
TIERS = """
user_groups: [Gold, Bronze]
user_group_map:
  Gold: [{id: a, quota_pct: 50}, {id: b, quota_pct: 30}, {id: default, quota_pct: 20}]
  Bronze: [{id: c, quota_pct: 100}]
"""
WAITS = TIERS + "tiers: {Gold: {max_wait: 0.2}, Bronze: {max_wait: 0.1}}\n"
USERS = [("a", ""), ("a", "x"), ("a", "y"), ("b", ""), ("c", ""), ("d", ""), ("e", "")]


def served(qos: str | None, seed: int, priorities: bool) -> list[tuple[float, str]]:
    """Leases and their times of a random trace; each user's requests are alike, and known to be."""
    rng, own = random.Random(seed), random.Random(seed + 1)
    site = Site(qos, slots=3)
    sizes = {"a": 20, "b": 10, "c": 50, "d": 30, "e": 20}
    for owner, size in sizes.items():
        site.submit(owner, output=size, tier="Gold" if owner in "de" else "")
        site.run()
    for _ in range(60):
        for _ in range(rng.randrange(4)):
            owner, sub = rng.choice(USERS)
            asked = own.choice([0, 0, 5, -3, 1000]) if priorities and owner in "ad" else 0
            tier = "Gold" if owner in "de" else ""
            site.submit(owner, output=sizes[owner], tier=tier, sub=sub, priority=asked)
        site.run(leases=rng.randrange(3))
        site.clock.now += rng.random() * 0.01
    site.run()
    return site.granted


@pytest.mark.parametrize("qos", [PLAIN, TIERS, WAITS], ids=["plain", "tiers", "max_wait"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_others_are_served_to_the_request_as_if_nobody_had_asked_for_an_order(qos: str | None, seed: int) -> None:
    without, with_priorities = served(qos, seed, False), served(qos, seed, True)
    assert len(without) == len(with_priorities)
    for (at, lease), (again, other) in zip(without, with_priorities, strict=True):
        assert at == again
        if lease[0] in "ad":
            assert lease[0] == other[0]
        else:
            assert lease == other


@pytest.mark.parametrize("qos", [PLAIN, TIERS, WAITS], ids=["plain", "tiers", "max_wait"])
def test_a_users_requests_go_by_priority_then_as_they_came(qos: str | None) -> None:
    site = Site(qos, slots=1)
    site.submit("a", output=60)
    wanted = [0, 2, -1, 0, 2, -1, -(2**31), 2**31 - 1]
    names = {site.submit("a", output=60, priority=p): (p, i) for i, p in enumerate(wanted)}
    site.run()
    assert [names[lease] for _, lease in site.granted[1:]] == sorted(names.values())


def test_sub_users_have_orders_of_their_own() -> None:
    site = Site(TIERS, slots=1)
    site.submit("a", sub="x")
    for sub in ("x", "y"):
        for i in range(3):
            site.submit("a", sub=sub, priority=-i if sub == "y" else 0)
    site.run()
    ranks = [int(lease.split("#")[1]) for _, lease in site.granted[1:]]
    assert [r for r in ranks if r <= 4] == [2, 3, 4]
    assert [r for r in ranks if r > 4] == [7, 6, 5]
    assert {*ranks[:2]} == {2, 7}  # in turn


def test_a_replay_goes_before_its_owners_urgent_requests() -> None:
    for qos in (PLAIN, TIERS):
        site = Site(qos, slots=1)
        site.submit("a")
        urgent = site.submit("a", priority=-5)
        replay = site.submit("a", priority=5, accepted=True)
        site.run()
        assert [lease for _, lease in site.granted[1:]] == [replay, urgent]


def test_who_lets_a_request_of_his_wait_is_not_overdue_with_it() -> None:
    """The engine's `max_wait` goes by the age that a lease tells: that of the place, not of the request."""
    site = Site(WAITS, slots=1)
    site.submit("a", output=150)
    late = site.submit("a", priority=9)
    ages = []
    for _ in range(20):
        site.submit("a")
        request = site.dispatcher._registry.by_model["m"].queue
        ages.append(site.clock.now - (request.since(late) or 0.0))
        site.run(leases=1)
    assert site.granted[-1][1] != late
    assert max(ages[8:]) < 0.2 < site.clock.now - 1000.0


def test_the_outlook_of_a_plain_queue_knows_the_order() -> None:
    dispatcher, _ = made()
    dispatcher.replica_up(info("r", slots=1))
    assert isinstance(dispatcher.acquire("i", ask("runs", owner="z")), Granted)
    for name, owner, priority in (("a1", "a", 0), ("b1", "b", 0), ("a2", "a", -1), ("a3", "a", 7), ("b2", "b", 0)):
        dispatcher.acquire("i", ask(name, owner=owner, priority=priority))
    queue = dispatcher._registry.by_model["m"].queue
    places = {name: queue.outlook(name, 1.0).position for name in ("a1", "a2", "a3", "b1", "b2")}
    assert places == {"a2": 1, "b1": 2, "a1": 3, "a3": 4, "b2": 5}
    assert dispatcher.cancel("a2") == []
    places = {name: queue.outlook(name, 1.0).position for name in ("a1", "b1", "a3", "b2")}
    assert places == {"a1": 1, "b1": 2, "a3": 3, "b2": 4}  # places change hands when one is used
