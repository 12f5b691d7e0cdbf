"""How many wait in a band is counted as requests move, and is what a look at every account says.

Mutants seen to fail: `place` without `_count`; `replace` leaving `counted`; `kinds` by the new number only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from router.qos.config import DEFAULT, Account, QosConfig, Tier
from router.qos.fair_queue import Facts, FairQueue
from router.qos.policy import Limits, Policy
from router.qos.standing import Standing

USERS = [f"u{i}" for i in range(12)]
TIERS = (Tier(0, "gold"), Tier(1, "tin", max_wait=5.0), Tier(2, "lead"))


def config(rng: random.Random) -> QosConfig:
    """Users in any tier, some with no quota, some with no line."""
    accounts = [
        Account(rng.choice(TIERS), user, rng.choice((0.0, 1.0, 2.5, 40.0))) for user in USERS if rng.random() < 0.8
    ]
    return QosConfig(TIERS, (*accounts, Account(rng.choice(TIERS), DEFAULT, 3.0)))


def check(policy: Policy) -> None:
    """Of every band, with the slow sum over all accounts that ever asked."""
    kinds: dict[int, Counter[tuple[int, float]]] = {}
    for standing in policy.standings:
        if standing.queued:
            kinds.setdefault(standing.band, Counter())[standing.queued, standing.weight] += 1
    for number, band in policy.bands.items():
        assert band.kinds == kinds.get(number, {})
        assert band.queued == sum(queued * n for (queued, _), n in band.kinds.items())
    assert set(kinds) <= set(policy.bands)


@pytest.mark.parametrize("seed", range(5))
def test_every_move_of_a_request_is_counted(seed: int) -> None:
    rng = random.Random(seed)
    policy = Policy(config(rng), Limits(step=100.0))
    moves: list[tuple[Callable[[Standing], None], str]] = [
        (policy.admitted, "queued"),
        (policy.withdrawn, "queued"),
        (policy.evicted, "resident"),
        (policy.ended, "resident"),
    ]
    most = 0
    for _ in range(1500):
        move, needs = rng.choice(moves)
        standing = policy.standing(policy.config.account(rng.choice(USERS)))
        if rng.random() < 0.01:
            policy.replace(config(rng))
        elif rng.random() < 0.4:
            policy.queued(standing)
        elif getattr(standing, needs):
            move(standing)
        if policy.find(standing.key) is standing:  # a configuration that replaced another may have forgotten it
            policy.expect(standing, rng.uniform(0.0, 50.0))
        check(policy)
        most = max(most, *(band.queued for band in policy.bands.values()))
    assert most > 5, "hardly anybody waited"


def slow_position(queue: FairQueue[Facts], facts: Facts) -> float:
    """Where one more request of `facts` would stand, by a look at every account."""
    me = queue.policy.standing(queue.policy.config.account(facts.user))
    mine = me.queued + 1
    position = float(mine)
    for other in queue.policy.standings:
        if other.band < me.band:
            position += other.queued
        elif other.band == me.band and other is not me:
            position += min(other.queued, mine * other.weight / me.weight)
    return position


@pytest.mark.parametrize("seed", range(5))
def test_a_place_is_foretold_as_by_a_look_at_every_account(seed: int) -> None:
    rng, now = random.Random(seed), 0.0
    queue: FairQueue[Facts] = FairQueue(
        config(rng), Limits(step=100.0), describe=lambda facts: facts, clock=lambda: now, limit=1000
    )
    names: list[str] = []
    for number in range(800):
        now += rng.random()
        act = rng.random()
        if act < 0.5:
            names.append(f"r{number}")
            queue.push(names[-1], Facts(rng.choice(USERS), "", 10.0, now))
        elif act < 0.7 and (first := queue.first()) is not None:
            names.remove(first)
            queue.granted(first)
        elif act < 0.8 and names:
            queue.remove(names.pop(rng.randrange(len(names))))
        elif act < 0.98 and len(names) > 3:
            for name in rng.sample(names, 3):
                queue.set_aside(name)
            check(queue.policy)
            queue.put_back()
        elif act >= 0.98:
            queue.replace(config(rng))
        check(queue.policy)
        facts = Facts(rng.choice(USERS), "", 10.0, now)
        assert abs(queue.prospect(facts).position - slow_position(queue, facts)) <= 0.5 + 1e-6
    assert len(queue) > 20
