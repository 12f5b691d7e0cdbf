"""What the dispatcher's queue says of its tiers, against all that waits, looked through; and what it looks at for that.

Mutants seen to fail: a tier's requests out of the order they were queued after others had been set aside, or after
another configuration; requests counted in the tier they were in before it; the oldest of a tier shed, or a replay.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from router.qos.config import Account, QosConfig, Tier
from router.qos.fair_queue import Facts, FairQueue
from router.qos.policy import Limits

TIERS = tuple(Tier(rank, name, max_queued=10**6, max_queued_per_user=10**6) for rank, name in enumerate("PGSB"))
USERS = 8


class Asked(NamedTuple):
    """What waits."""

    user: str
    arrived: float
    accepted: bool


def config(shift: int = 0) -> QosConfig:
    """User n is of tier n + `shift`."""
    return QosConfig(TIERS, tuple(Account(TIERS[(n + shift) % 4], f"u{n}", 10.0) for n in range(USERS)))


class Room:
    """A queue, and what waits in it, as a list."""

    def __init__(self, limit: int = 10**6) -> None:
        self.now, self.count, self.shift = 0.0, 0, 0
        self.queue: FairQueue[Asked] = FairQueue(
            config(),
            Limits(step=1000.0),
            describe=lambda r: Facts(r.user, "", 10.0, r.arrived, r.accepted),
            clock=lambda: self.now,
            limit=limit,
        )
        self.waiting: dict[str, Asked] = {}  # in the order they were queued

    def push(self, user: int, *, accepted: bool = False) -> str:
        name, asked = f"r{self.count}", Asked(f"u{user}", self.now, accepted)
        self.count += 1
        self.now += 1.0
        self.queue.push(name, asked)
        self.waiting[name] = asked
        return name

    def tier(self, asked: Asked) -> Tier:
        return TIERS[(int(asked.user[1:]) + self.shift) % 4]

    def grant(self) -> None:
        first = self.queue.first()
        assert first is not None
        self.queue.granted(first)
        del self.waiting[first]

    def check(self) -> None:
        for state in self.queue.tiers():
            of_tier = [a for a in self.waiting.values() if self.tier(a).name == state.tier]
            oldest = self.now - of_tier[0].arrived if of_tier else 0.0
            assert (state.waiting, state.oldest_seconds) == (len(of_tier), oldest)
        for user in range(4):
            asked = Asked(f"u{user}", self.now, False)
            ahead = sum(self.tier(a).rank <= self.tier(asked).rank for a in self.waiting.values())
            assert self.queue.ahead(asked) == ahead


def test_anything_in_any_order() -> None:
    rng, room = random.Random(0), Room()
    for _ in range(400):
        match rng.randrange(9):
            case 0 | 1 | 2 | 3:
                room.push(rng.randrange(USERS), accepted=rng.random() < 0.1)
            case 4 | 5 if room.waiting:
                room.grant()
            case 6 if room.waiting:
                gone = rng.choice(list(room.waiting))
                assert room.queue.remove(gone) is room.waiting.pop(gone)
            case 7:
                for name in rng.sample(list(room.waiting), min(2, len(room.waiting))):
                    room.queue.set_aside(name)
                room.queue.put_back()
            case 8 if rng.random() < 0.2:
                room.shift += 1
                room.queue.replace(config(room.shift))
            case _:
                pass
        room.check()
    assert len(room.waiting) > 30


def test_the_youngest_of_the_lowest_tier_makes_room() -> None:
    room = Room(limit=6)
    names = [room.push(user, accepted=accepted) for user, accepted in ((3, False), (7, False), (3, True), (2, False))]
    room.queue.set_aside(names[0])
    room.queue.put_back()
    room.push(1)
    room.push(2)
    newcomer = Asked("u0", room.now, False)
    assert room.queue.shed(newcomer) is room.waiting[names[1]]
    room.push(2)
    assert room.queue.refusal(Asked("u3", room.now, False)) == "6 requests wait already"
    assert room.queue.refusal(newcomer) is None
    assert room.queue.shed(newcomer) is room.waiting[names[0]]
    room.push(1)
    assert room.queue.refusal(newcomer) == "6 requests wait already"  # a replay is the last of the lowest tier


def test_many_that_wait_are_not_looked_through() -> None:
    few, many = Room(), Room()
    for room, count in ((few, 10), (many, 1000)):
        for _ in range(count):
            room.push(3)
        room.push(0)
        room.queue.tiers()  # looks after the gaps between accounts, too, which are as many
        room.now += 0.5
    assert lines_run(many.queue.tiers) == lines_run(few.queue.tiers)


def lines_run(call: Callable[[], Any]) -> int:
    """How many lines of Python `call` runs."""
    count = 0

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
