"""Users who share a line take turns by service, not by requests. Mutants seen to fail: units ignored; no clock."""

from __future__ import annotations

from collections import Counter

from router.qos.members import Members


def served(members: Members, units: dict[str, float], rounds: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        item = members.first()
        user = item.split("#")[0]
        members.remove(user, item, units[user])
        counts[user] += 1
    return counts


def filled(**users: int) -> Members:
    members = Members()
    for user, number in users.items():
        for i in range(number):
            members.push(user, f"{user}#{i}", (True, float(i)))
    return members


def test_turns_are_by_service() -> None:
    counts = served(filled(long=50, short=200), {"long": 10.0, "short": 1.0}, 110)
    assert 9 <= counts["long"] <= 11


def test_who_was_away_has_no_claim() -> None:
    members = filled(steady=200)
    served(members, {"steady": 1.0}, 100)
    for i in range(50):
        members.push("guest", f"guest#{i}", (True, float(i)))
    counts = served(members, {"steady": 1.0, "guest": 1.0}, 40)
    assert 19 <= counts["guest"] <= 21


def test_who_comes_one_by_one_keeps_what_it_has_had() -> None:
    members = filled(steady=200)
    counts: Counter[str] = Counter()
    for i in range(40):
        members.push("single", f"single#{i}", (True, 0.0))
        while "single" not in counts or counts["single"] <= i:
            counts += served(members, {"steady": 1.0, "single": 5.0}, 1)
    assert counts["steady"] >= 4 * 39


def test_a_replay_goes_before_its_users_other_requests() -> None:
    members = filled(a=3)
    members.push("a", "a#replay", (False, 99.0))
    assert members.first() == "a#replay"
    members.push("a", "a#older", (False, 1.0))
    assert members.first() == "a#older"
    members.remove("a", "a#older")
    members.remove("a", "a#replay")
    assert members.first() == "a#0"
    assert members.ahead("a", "a#2") == 2


def test_the_idle_are_forgotten() -> None:
    members = Members()
    for i in range(5000):
        members.push(f"u{i}", f"u{i}#0", (True, 0.0))
        members.remove(f"u{i}", f"u{i}#0", 1.0)
    assert len(members._members) < 200
