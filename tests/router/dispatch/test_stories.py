"""What is told of a request: places, candidates, prediction, bill; to whom; and that no more is kept than was said."""

from __future__ import annotations

from typing import Any

import pytest

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Ended, Granted, Outcome, Settle
from router.dispatch.stories import MOST_CANDIDATES, MOST_LEASES, MOST_PLACES, Stories
from router.qos.file import make_qos_config
from router.qos.source import parse_source

from .virtual import Clock, ask, info, made

TIERS = """
user_groups: [Gold, Bronze]
user_group_map:
  Gold: [{id: anna, quota_pct: 100}]
  Bronze: [{id: ben, quota_pct: 50}, {id: carl, quota_pct: 50}]
"""
PARTS = (("prepare", 0.01), ("queue", 0.5), ("first_token", 0.125), ("generate", 1.0), ("finish", 0.002))


def site(replicas: int = 2, slots: int = 1) -> tuple[Dispatcher, Clock]:
    qos = make_qos_config(parse_source(TIERS, "f", as_json=False))
    d, clock = made(DispatcherConfig(recovery=0.0, qos=qos, suspect_after=1e9))
    for i in range(replicas):
        d.replica_up(info(f"r{i}", slots=slots, blocks=1000))
    return d, clock


def acquire(d: Dispatcher, lease: str, owner: str, name: str, **rest: Any) -> Any:
    return d.acquire("i", ask(lease, owner=owner, name=f"{name}.0123456789ab", **rest))


def ended(name: str, owner: str, outcome: str = "stop") -> Ended:
    return Ended(name, owner, outcome, PARTS, 0.635, 32, 16, 7)


def test_the_whole_story() -> None:
    d, clock = site()
    assert isinstance(acquire(d, "1", "anna", "first"), Granted)
    d.drain("r1")
    for i in range(3):
        assert acquire(d, f"b{i}", "ben", f"ben{i}") is None
    assert acquire(d, "c", "carl", "mine", sub="bob", prompt=48) is None
    waiting = d.story("carl", "mine")
    assert waiting is not None
    assert (waiting["state"], waiting["position"], waiting["user"]) == ("waiting", 2, "bob")
    low, middle, high = waiting["wait_seconds"]
    assert 0.0 <= low <= middle <= high
    for _ in range(60):
        clock.now += 0.1
        d.tick()
    replies = d.settle(Settle("1", Outcome.COMPLETED, 32, 9, 0, 10))
    while not any(r.message.lease_id == "c" for r in replies):
        clock.now += 1.0
        replies = d.settle(Settle(replies[0].message.lease_id, Outcome.COMPLETED, 32, 9, 0, 10))
    running = d.story("carl", "mine")
    assert running is not None
    assert (running["state"], "position" in running) == ("running", False)
    clock.now += 2.0
    d.settle(Settle("c", Outcome.COMPLETED, 32, 6, 16, 7, first_seconds=0.135, preemptions=2))
    d.stories.ended(ended("mine", "carl"))

    story = d.story("carl", "mine")
    assert story is not None
    assert (story["tier"], story["account"], story["state"], story["outcome"]) == ("Bronze", "carl", "ended", "stop")
    (lease,) = story["leases"]
    assert lease["front"] == "i"
    assert [p["position"] for p in lease["positions"]] == [2] * len(lease["positions"])
    times = [p["after_seconds"] for p in lease["positions"]]
    assert times == sorted(times)
    assert len(times) >= 3
    chosen, other = lease["candidates"]
    assert (chosen["replica"], chosen["state"]) == ("r0", "chosen")
    assert (other["replica"], other["state"]) == ("r1", "draining")
    assert chosen["expected_seconds"] == lease["granted"]["predicted_seconds"] > 0.0
    assert lease["granted"]["after_seconds"] >= 6.0
    end = lease["end"]
    assert (end["cached_tokens"], end["preemptions"], end["first_token_seconds"]) == (16, 2, 0.135)
    reads = 6 * (48 + 3)
    assert end["units"] == pytest.approx(32 + 2 * 6 + 0.002 * reads)
    assert (story["units"], story["preemptions"]) == (end["units"], 2)
    seconds = dict(story["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert seconds == dict(PARTS)


def test_a_story_is_its_owners() -> None:
    """Ids are the clients' own: two may have the same, and each sees its own. None is for admins: the last one."""
    d, _ = site(slots=4)
    acquire(d, "1", "anna", "same")
    acquire(d, "2", "ben", "same")
    for owner in ("anna", "ben"):
        found = d.story(owner, "same")
        assert found is not None
        assert found["owner"] == owner
    anybody = d.story(None, "same")
    assert anybody is not None
    assert anybody["owner"] == "ben"
    assert d.story("carl", "same") is None
    assert d.story("anna", "other") is None


def test_how_it_can_end_without_a_bill() -> None:
    d, _ = site(replicas=1)
    acquire(d, "1", "anna", "running")
    acquire(d, "2", "anna", "waiting")
    acquire(d, "3", "ben", "left")
    acquire(d, "4", "ben", "long", prompt=5000)
    d.cancel("3")
    d.replica_down("r0")
    outcomes = {}
    for owner, name in (("anna", "running"), ("anna", "waiting"), ("ben", "left"), ("ben", "long")):
        story = d.story(owner, name)
        assert story is not None
        end = story["leases"][0]["end"]
        outcomes[name] = None if end is None else end["outcome"]
    assert outcomes == {"running": "lost", "waiting": None, "left": "cancelled", "long": "refused"}


def test_an_id_that_is_used_again_names_the_newer_request() -> None:
    d, _ = site(slots=4)
    acquire(d, "1", "anna", "again")
    d.stories.ended(ended("again", "anna"))
    acquire(d, "2", "anna", "again")
    story = d.story("anna", "again")
    assert story is not None
    assert (story["state"], len(story["leases"])) == ("running", 1)


def test_what_is_kept_is_bounded() -> None:
    stories, most = Stories(most=10), 10
    for i in range(1000):
        stories.asked("i", ask(f"l{i}", name=f"r{i}.x"), "", "", 0.0)
    assert len(stories) == most
    assert len(stories._by_lease) == most
    assert len(stories._last) == most
    for i in range(100):
        stories.asked("i", ask(f"p{i}", name="many.x"), "", "", 0.0)
    told = stories.tell("default", "many")
    assert told is not None
    assert len(told["leases"]) == MOST_LEASES
    now = 0.0
    for _ in range(10_000):
        now += 1.0
        while (lease_id := stories.due(now)) is not None:
            stories.stands(lease_id, 1, now)
    told = stories.tell("default", "many")
    assert told is not None
    assert all(0 < len(lease["positions"]) <= MOST_PLACES for lease in told["leases"])
    d, _ = made(DispatcherConfig(recovery=0.0))
    for i in range(30):
        d.replica_up(info(f"r{i}"))
    d.acquire("i", ask("1", name="one.x"))
    story = d.story("default", "one")
    assert story is not None
    assert len(story["leases"][0]["candidates"]) == MOST_CANDIDATES


def test_who_tells_no_name_is_not_remembered() -> None:
    d, _ = made()
    d.replica_up(info("a"))
    d.acquire("i", ask("1"))
    assert len(d.stories) == 0
