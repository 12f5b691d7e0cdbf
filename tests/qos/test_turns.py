"""One step's turns, by hand: who is left out, who comes when.

Mutants seen to fail: `_paced` always False; the reference taken without looking at `admissible`; `close` that does not
put accounts back.
"""

from __future__ import annotations

import pytest

from router.qos.policy import Limits, Policy
from router.qos.standing import Standing
from router.qos.turns import Turns
from workers.api.ordering import Charge

from .planners import tiers

X = 1000.0


def made(**users: int) -> tuple[Policy, dict[str, Standing]]:
    """One tier of equal users, each with one running request and `waiting` ones."""
    policy = Policy(tiers(dict.fromkeys(users, 1.0)), Limits(X, pacing=X))
    found = {u: policy.standing(policy.config.account(u)) for u in users}
    for name, waiting in users.items():
        policy.queued(found[name])
        policy.admitted(found[name])
        for _ in range(waiting):
            policy.queued(found[name])
    return policy, found


def serve(policy: Policy, standing: Standing, units: int) -> None:
    policy.commit(units, [Charge(standing, units)])


def order(policy: Policy, admissible: set[str]) -> list[str]:
    """Whose turns one step has, each of 10 units."""
    turns, seen = Turns(policy, 0.0), []
    while (turn := turns.next()) is not None:
        name = turn.flow.account.id
        seen.append(name)
        turns.served(10.0, more=False, admissible=name in admissible)
    provisional = turns.close()
    policy.commit(0, [], provisional)
    return seen


@pytest.mark.parametrize(("ahead", "left_out"), [(int(X), False), (int(X) + 1, True)])
def test_who_is_more_than_x_ahead_of_admissible_work_is_left_out(ahead: int, left_out: bool) -> None:
    policy, found = made(least=3, most=3)
    serve(policy, found["most"], ahead)
    assert order(policy, {"least", "most"}) == (["least"] if left_out else ["least", "most"])


def test_work_that_cannot_be_admitted_paces_nobody() -> None:
    policy, found = made(least=3, most=3)
    serve(policy, found["most"], 50_000)
    assert order(policy, {"most"}) == ["least", "most"]


def test_after_a_step_everybody_stands_where_they_belong() -> None:
    policy, found = made(a=1, b=0, c=2)
    serve(policy, found["a"], 30)
    serve(policy, found["b"], 20)
    for _ in range(3):
        assert order(policy, set()) == ["c", "b", "a"]
    policy.ended(found["b"])
    assert order(policy, set()) == ["c", "a"]


def test_a_turn_that_only_its_allowance_ended_comes_again_at_its_new_time() -> None:
    policy, _ = made(a=1, b=1)
    turns, seen = Turns(policy, 0.0), []
    for _ in range(6):
        turn = turns.next()
        assert turn is not None
        seen.append(turn.flow.account.id)
        turns.served(100.0 if seen[-1] == "a" else 50.0, more=True)
    turns.close()
    assert seen == ["a", "b", "b", "a", "b", "b"]


def test_plans_ahead_see_what_is_in_flight() -> None:
    policy, found = made(a=1, b=1)
    first = Turns(policy, 0.0)
    turn = first.next()
    assert turn is not None
    assert turn.flow is found["a"]
    first.served(500.0, more=False)
    provisional = first.close()
    second = Turns(policy, 0.0)
    turn = second.next()
    assert turn is not None
    assert turn.flow is found["b"]
    second.served(0.0, more=False)
    second.close()
    third = Turns(policy, 0.0).next()
    assert third is not None
    assert third.flow is found["b"]  # looked at, but not served: it is still there
    policy.commit(500, [Charge(found["a"], 300, overhead=200)], provisional)
    assert (found["a"].pending, found["a"].service, policy.ledger.missing) == (0.0, 300.0, 0)
