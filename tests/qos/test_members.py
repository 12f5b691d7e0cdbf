"""Users who share a line take turns by service, not by requests. Mutants seen to fail: units ignored; no clock."""

from __future__ import annotations

from collections import Counter

from router.qos.members import MOST_SUBS, Members, Place


def served(members: Members, units: dict[str, float], rounds: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        item = members.first()
        user = item.split("#")[0]
        members.remove(item, units[user])
        counts[user] += 1
    return counts


def filled(**users: int) -> Members:
    members = Members()
    for user, number in users.items():
        for i in range(number):
            members.push(user, f"{user}#{i}", Place(True, 0, float(i)))
    return members


def test_turns_are_by_service() -> None:
    counts = served(filled(long=50, short=200), {"long": 10.0, "short": 1.0}, 110)
    assert 9 <= counts["long"] <= 11


def test_who_was_away_has_no_claim() -> None:
    members = filled(steady=200)
    served(members, {"steady": 1.0}, 100)
    for i in range(50):
        members.push("guest", f"guest#{i}", Place(True, 0, float(i)))
    counts = served(members, {"steady": 1.0, "guest": 1.0}, 40)
    assert 19 <= counts["guest"] <= 21


def test_who_comes_one_by_one_keeps_what_it_has_had() -> None:
    members = filled(steady=200)
    counts: Counter[str] = Counter()
    for i in range(40):
        members.push("single", f"single#{i}", Place(True, 0, 0.0))
        while "single" not in counts or counts["single"] <= i:
            counts += served(members, {"steady": 1.0, "single": 5.0}, 1)
    assert counts["steady"] >= 4 * 39


def test_a_replay_goes_before_its_users_other_requests() -> None:
    members = filled(a=3)
    members.push("a", "a#replay", Place(False, 0, 99.0))
    assert members.first() == "a#replay"
    members.push("a", "a#older", Place(False, 0, 1.0))
    assert members.first() == "a#older"
    members.remove("a#older")
    members.remove("a#replay")
    assert members.first() == "a#0"
    assert members.ahead("a#2") == 2


def test_the_idle_are_forgotten() -> None:
    members = Members()
    for i in range(5000):
        members.push(f"u{i}", f"u{i}#0", Place(True, 0, 0.0))
        members.remove(f"u{i}#0", 1.0)
    assert len(members._members) < 200


def with_subs(members: Members, user: str, subs: int, requests: int) -> None:
    """So many sub-users of `user`, each with so many requests."""
    for s in range(subs):
        for i in range(requests):
            members.push(user, f"{user}#{s}#{i}", Place(True, 0, float(i)), f"s{s}")


def test_sub_users_share_their_users_turn() -> None:
    """Five hundred names of one user against a user without any: half each. Mutant seen to fail: a turn a sub-user."""
    members = filled(plain=300)
    with_subs(members, "many", 500, 1)
    counts = served(members, {"plain": 1.0, "many": 1.0}, 200)
    assert 99 <= counts["many"] <= 101


def test_sub_users_of_one_user_take_turns() -> None:
    members = Members()
    for i in range(100):
        members.push("anna", f"anna#loud#{i}", Place(True, 0, float(i)), "loud")
    for i in range(10):
        members.push("anna", f"anna#quiet#{i}", Place(True, 0, 100.0 + i), "quiet")
    first = []
    for _ in range(20):
        first.append(members.first())
        members.remove(first[-1], 1.0)
    assert sum("quiet" in item for item in first) == 10
    assert members.first() == "anna#loud#10"


def test_the_first_sub_user_does_not_overtake_what_waits_already() -> None:
    members = filled(anna=4)
    members.push("anna", "anna#bob", Place(True, 0, 9.0), "bob")
    order = []
    while len(members):
        order.append(members.first())
        members.remove(order[-1], 1.0)
    assert order == ["anna#0", "anna#bob", "anna#1", "anna#2", "anna#3"]


def test_a_replay_goes_before_all_sub_users() -> None:
    members = Members()
    with_subs(members, "anna", 3, 2)
    members.push("anna", "anna#replay", Place(False, 0, 99.0), "s1")
    assert members.first() == "anna#replay"
    members.remove("anna#replay", 5.0)
    assert members.first() == "anna#0#0"


def test_the_sub_users_remembered_are_bounded() -> None:
    """One name a request, under a backlog that never ends: names beyond the bound share a turn."""
    members = filled(other=1)
    for i in range(5000):
        members.push("anna", f"anna#{i}", Place(True, 0, float(i)), f"name{i}")
        if i >= 10:
            item = members.first()
            members.remove(item, 1.0)
    subs = members._members["anna"].line
    assert len(subs._members) <= MOST_SUBS + 2
    while len(members):
        members.remove(members.first(), 1.0)
