"""Sessions' histories and their rounds: the plain object, and over sockets with fronts and a dispatcher that die.

Mutants seen to fail: a revision unread at the end; a lost front's round for ever; who holds the least giving room; what
a front remembers not told, or told over what is newer; a round begun for somebody who left that runs for ever; what was
forgotten counted as held, or as evicted; a look at every session a tick, or at every owner when there is no room; a
session that expires under its round, or never after it.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from router.dispatch.client import DispatcherClient
from router.dispatch.histories import ENTRY_BYTES, MAX_HISTORY_BYTES, KeptHistories
from router.dispatch.rounds import (
    BeginRound,
    Begun,
    CancelRound,
    EndRound,
    HoldRound,
    RoundBegun,
    RoundCancelled,
    SessionCounts,
)
from router.dispatch.rounds import StopRound as Stop
from router.protocol.errors import HttpRefusal
from router.remote_histories import RemoteHistories
from workers.api.errors import NoReplica, Overloaded

from .fakes import SECRET, Cluster, until
from .virtual import Clock

TTL = 100.0


@dataclass
class Table:
    """The plain object, with its clock and short ways to say things."""

    most: int = 3
    max_bytes: int = 1 << 30
    patience: float = 0.0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.kept = KeptHistories(self.clock, grace=5.0, patience=self.patience, max_bytes=self.max_bytes)

    def begin(self, front: str = "i", session: int = 1, owner: str = "o", **more: bool) -> RoundBegun | None:
        told = self.kept.begin(front, BeginRound(7, owner, session, self.most, TTL, **more))
        assert all(client == front for client, _ in told)
        return told[0][1] if told else None  # type: ignore[return-value]

    def end(self, history: bytes, revision: int = 0, front: str = "i", session: int = 1, owner: str = "o") -> object:
        return self.kept.end(front, EndRound(owner, session, revision, history, TTL))

    def say(self, history: bytes, session: int = 1, owner: str = "o") -> None:
        begun = self.begin(session=session, owner=owner)
        assert begun is not None
        assert begun.verdict is Begun.BEGUN
        self.end(history, begun.revision, session=session, owner=owner)

    def has(self, session: int = 1, owner: str = "o") -> bytes:
        begun = self.begin("looks", session, owner)
        assert begun is not None
        self.end(b"", begun.revision, "looks", session, owner)
        return begun.history


def test_a_round_gets_what_the_last_one_left() -> None:
    table = Table()
    table.say(b"one")
    begun = table.begin("j")
    assert begun == RoundBegun(7, "o", 1, Begun.BEGUN, 1, b"one")
    assert table.begin("i") == RoundBegun(7, "o", 1, Begun.RUNNING)
    table.end(b"never", 0, "j")  # of a round that began before the last one
    table.end(b"never", 1, "i")  # of another front
    table.end(b"two", 1, "j")
    assert table.has() == b"two"
    table.begin()
    table.end(b"", 2)
    assert (table.has(), table.kept.running) == (b"two", 0)
    assert table.kept.bytes == ENTRY_BYTES + 3


def test_nothing_is_left_of_first_rounds_that_came_to_nothing_and_of_what_expired() -> None:
    table = Table()
    table.begin()
    table.end(b"")
    assert (len(table.kept), table.kept.bytes) == (0, 0)
    table.say(b"one")
    table.clock.now += TTL - 0.1
    assert table.has() == b"one"
    table.begin()
    table.clock.now += 1.0
    assert table.kept.tick() == []
    table.end(b"two", 1)  # a round that ran longer than its session had left
    table.clock.now += TTL - 0.1
    assert table.has() == b"two"
    table.clock.now += 0.2
    assert table.kept.tick() == []
    assert (len(table.kept), table.kept.bytes, table.has()) == (0, 0, b"")


def test_an_owner_has_so_many_sessions() -> None:
    table = Table(most=3)
    for session in (1, 2, 3, 1, 4):
        table.say(b"x", session)
        table.say(b"y", session, "other")
    assert [table.has(n) for n in (1, 3, 4)] == [b"x"] * 3
    assert len(table.kept) == 6
    for session in (1, 3, 4):
        table.begin(session=session)
    verdict = table.begin(session=5)
    assert verdict is not None
    assert verdict.verdict is Begun.FULL
    table.end(b"x", 2, session=1)
    assert table.has(5) == b""
    assert table.has(1) == b""  # it made room


def test_bytes_are_bounded_and_who_holds_the_most_gives() -> None:
    table = Table(most=99, max_bytes=10 * (ENTRY_BYTES + 100))
    table.say(b"s" * 100, 1, "small")
    for session in range(20):
        table.say(b"L" * 100, session, "large")
    assert table.kept.bytes <= table.max_bytes
    assert table.has(1, "small") == b"s" * 100
    assert [n for n in range(20) if table.has(n, "large")] == list(range(11, 20))
    table.say(b"x" * (MAX_HISTORY_BYTES + 1), 1, "small")
    assert table.has(1, "small") == b""


def test_counts_of_what_is_held_and_of_why_it_went() -> None:
    table = Table(most=2, max_bytes=4 * (ENTRY_BYTES + 100))
    assert table.kept.counts == SessionCounts()

    def counted() -> tuple[int, int, dict[str, int]]:
        counts = table.kept.counts
        return counts.held, counts.running, {why: n for why, n in counts.evicted if n}

    for session in (1, 2, 3):
        table.say(b"x" * 100, session)
    assert counted() == (2, 0, {"count": 1})
    for owner in "abc":
        table.say(b"x" * 100, 1, owner)
    assert counted() == (4, 0, {"count": 1, "memory": 1})
    table.begin(session=3)
    table.begin(session=1, owner="a", forget=True)
    assert counted() == (3, 1, {"count": 1, "memory": 1})
    table.clock.now += TTL
    table.kept.tick()
    assert counted() == (1, 1, {"count": 1, "memory": 1, "expired": 2})
    table.end(b"x" * (MAX_HISTORY_BYTES + 1), 1, session=3)
    assert counted() == (0, 0, {"count": 1, "memory": 1, "expired": 2, "size": 1})
    assert table.kept.counts.bytes == table.kept.bytes == ENTRY_BYTES


def test_forgotten() -> None:
    table = Table()
    begun = table.begin(forget=True)
    assert begun is not None
    assert begun.verdict is Begun.FORGOTTEN
    assert len(table.kept) == 0
    table.say(b"one")
    begun = table.begin(forget=True)
    assert begun == RoundBegun(7, "o", 1, Begun.FORGOTTEN, 2)
    table.kept.hold("j", HoldRound("o", 1, 1, b"one", TTL, 0))  # who remembers it from before
    assert table.has() == b""


def test_cancelled() -> None:
    table = Table()
    asked = CancelRound(9, "o", 1)
    assert table.kept.cancel("j", asked) == [("j", RoundCancelled(9, ran=False))]
    table.begin()
    assert table.kept.cancel("j", asked) == [("i", Stop("o", 1, 7))]
    assert table.end(b"part") == [("j", RoundCancelled(9, ran=True))]
    assert table.has() == b"part"


def test_an_end_that_takes_longer_than_the_next_beginning() -> None:
    table = Table(patience=0.2)
    table.begin("i")
    assert table.begin("j") is None
    told = table.end(b"one")
    assert told == [("j", RoundBegun(7, "o", 1, Begun.BEGUN, 1, b"one"))]
    assert table.begin("i") is None
    table.clock.now += 0.19
    assert table.kept.tick() == []
    table.clock.now += 0.02
    assert table.kept.tick() == [("i", RoundBegun(7, "o", 1, Begun.RUNNING))]


def test_a_front_that_goes_away_gives_up_its_rounds_after_a_while() -> None:
    table = Table(patience=99.0)
    table.say(b"one")
    table.begin("i")
    table.kept.cancel("k", CancelRound(9, "o", 1))
    assert table.begin("j") is None
    table.kept.client_gone("i")
    table.clock.now += 4.9
    assert table.kept.tick() == []
    table.clock.now += 0.2
    assert table.kept.tick() == [
        ("k", RoundCancelled(9, ran=True)),
        ("j", RoundBegun(7, "o", 1, Begun.BEGUN, 1, b"one")),
    ]
    table.end(b"late", 1, "i")
    table.end(b"two", 1, "j")
    assert table.has() == b"two"


def test_a_front_that_comes_back_holds_its_round() -> None:
    table = Table()
    table.begin("i")
    table.kept.client_gone("i")
    table.kept.hold("i", HoldRound("o", 1, 0, b"", TTL, 7))
    table.clock.now += 50.0
    assert table.kept.tick() == []
    table.end(b"one")
    table.begin("i")
    table.kept.client_gone("i")
    assert table.kept.hold("i", HoldRound("o", 1, 2, b"two", TTL, 0)) == []  # it ended while it was away
    assert (table.has(), table.kept.running) == (b"two", 0)


def test_a_round_outlives_its_sessions_time() -> None:
    table = Table()
    table.say(b"one")
    table.begin("i")
    table.clock.now += TTL
    assert (table.kept.tick(), len(table.kept)) == ([], 1)
    table.kept.client_gone("i")
    table.clock.now += 5.0
    assert (table.kept.tick(), len(table.kept)) == ([], 1)  # the round is given up, and what was before it
    assert (table.kept.tick(), len(table.kept)) == ([], 0)  # has had its time


class Seconds(float):
    """Of a clock; counts how often times are compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        Seconds.compared += 1
        return float(self) < float(other)

    def __le__(self, other: float) -> bool:
        Seconds.compared += 1
        return float(self) <= float(other)

    def __add__(self, other: float) -> Seconds:
        return Seconds(float(self) + other)


class Owner(str):
    """Counts how often one is looked up."""

    __slots__ = ()
    looked_up = 0

    def __hash__(self) -> int:
        Owner.looked_up += 1
        return super().__hash__()


def test_a_tick_looks_at_what_has_expired_alone() -> None:
    table = Table(most=1000)
    table.clock.now = Seconds(0.0)
    for session in range(1000):
        table.say(b"x", session, owner=f"o{session % 10}")
        table.clock.now += 1 / 16
    table.say(b"x", 0, owner="o0")  # the oldest is the latest now
    table.clock.now = Seconds(TTL + 99 / 16)
    Seconds.compared = 0
    table.kept.tick()
    assert len(table.kept) == 901
    assert Seconds.compared < 99 * 30  # twice the depth of the heap
    assert table.has(0, "o0") == b"x"
    assert table.has(99, "o9") == b""
    Seconds.compared = 0
    table.kept.tick()
    assert (len(table.kept), Seconds.compared) == (901, 1)


def test_room_is_made_without_a_look_at_all_owners() -> None:
    table = Table(max_bytes=1000 * (ENTRY_BYTES + 100))
    for number in range(1000):
        table.say(b"x" * 100, owner=Owner(f"o{number}"))
    Owner.looked_up = 0
    table.begin(owner=Owner("o500"))  # who holds the most once his round is over, and none before
    for number in range(10):
        table.say(b"x" * 90, owner=Owner(f"n{number}"))
    table.end(b"x" * 1000, 1, owner=Owner("o500"))
    assert Owner.looked_up < 1000
    assert table.kept.bytes <= table.max_bytes
    assert table.has(owner="o500") == b""
    assert table.has(owner="n9") == b"x" * 90


def test_what_is_held_without_room_for_it() -> None:
    table = Table(max_bytes=ENTRY_BYTES + 100)
    table.kept.hold("i", HoldRound("o", 1, 1, b"x" * 101, TTL, 7))
    assert table.kept.running == 1
    table.kept.hold("i", HoldRound("o", 2, 1, b"x" * 101, TTL, 0))
    assert (table.has(2), table.kept.running) == (b"", 1)
    table.kept.client_gone("i")
    table.clock.now += 5.0
    table.kept.tick()
    assert (len(table.kept), table.kept.bytes) == (0, 0)


def test_what_was_forgotten_before_it_was_known_is_not_held() -> None:
    table = Table()
    table.kept.hold("i", HoldRound("o", 1, 0, b"", TTL, 0))
    assert len(table.kept) == 0


def test_anything_in_any_order() -> None:
    rng, table = random.Random(0), Table(most=4, max_bytes=12 * (ENTRY_BYTES + 50), patience=0.3)
    expired = running = 0
    for _ in range(5000):
        front, owner, session = rng.choice("ij"), rng.choice("abcde"), rng.randrange(6)
        history = b"x" * rng.randrange(100)
        match rng.randrange(7):
            case 0 | 1:
                table.begin(front, session, owner, forget=rng.random() < 0.2)
            case 2 | 3:
                table.end(history if rng.random() < 0.8 else b"", rng.randrange(4), front, session, owner)
            case 4:
                known = HoldRound(owner, session, rng.randrange(4), history, rng.uniform(1, TTL), rng.choice((0, 7)))
                table.kept.hold(front, known)
            case 5:
                table.kept.client_gone(front)
            case _:
                table.clock.now += rng.choice((0.1, 1.0, 10.0))
                table.kept.tick()
                table.kept.tick()  # what a front that is gone has left may have had its time
                sessions = [(o, n, s) for o, of in table.kept._owners.items() for n, s in of.items()]
                assert all(s.until > table.clock.now for _, _, s in sessions if s.client is None)
                assert {(o, n) for o, n, s in sessions if s.client} == table.kept._busy.keys()
                assert sum(s.bytes for _, _, s in sessions) == table.kept.bytes == sum(table.kept._bytes.values())
                begun = ENTRY_BYTES * table.kept.running  # room is made when a round ends
                assert table.kept.bytes <= table.max_bytes + begun or all(s.client for _, _, s in sessions)
                running = max(running, table.kept.running)
                expired = dict(table.kept.counts.evicted)["expired"]
    assert expired > 20
    assert running > 5


class Fronts:
    """Two fronts of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.clients = [
            DispatcherClient(name, secret=SECRET, locate=cluster._locate) for name in ("front-1", "front-2")
        ]
        self.first, self.second = (RemoteHistories(c, ttl=TTL, max_sessions=2, patience=0.2) for c in self.clients)

    async def __aenter__(self) -> Fronts:
        for client in self.clients:
            client.start()
        await self.connected()
        return self

    async def connected(self) -> None:
        await until(lambda: all(c.connected and c._proven for c in self.clients))

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await client.close()


async def say(front: RemoteHistories, text: bytes, session: int = 1) -> None:
    front.end("o", session, await front.begin("o", session, lambda: None) + text)


async def has(front: RemoteHistories, session: int = 1) -> bytes:
    history = await front.begin("o", session, lambda: None)
    front.end("o", session, b"")
    return history


async def test_every_front_sees_a_session() -> None:
    async with Cluster(0) as cluster, Fronts(cluster) as fronts:
        await say(fronts.first, b"one ")
        await say(fronts.second, b"two ")
        stopped = asyncio.Event()
        assert await fronts.first.begin("o", 1, stopped.set) == b"one two "
        with pytest.raises(HttpRefusal) as refused:
            await fronts.second.begin("o", 1, stopped.set)
        assert refused.value.status == 409
        cancel = asyncio.create_task(fronts.second.cancel("o", 1))
        await stopped.wait()
        assert not cancel.done()
        fronts.first.end("o", 1, b"one two three ")
        await cancel
        assert await has(fronts.second) == b"one two three "
        await fronts.second.forget("o", 1)
        assert await has(fronts.first) == b""


async def test_a_session_outlives_its_front_and_its_dispatcher() -> None:
    async with Cluster(0) as cluster, Fronts(cluster) as fronts:
        await say(fronts.first, b"one ")
        await say(fronts.second, b"two ")
        await say(fronts.first, b"a ", 2)
        await fronts.second.forget("o", 2)
        assert await fronts.second.begin("o", 3, lambda: None) == b""
        await cluster.stop_dispatcher()
        await until(lambda: not any(c.connected for c in fronts.clients))
        fronts.second.end("o", 3, b"said without a dispatcher")
        with pytest.raises(NoReplica):
            await fronts.first.begin("o", 1, lambda: None)
        await cluster.start_dispatcher()
        await fronts.connected()
        found = [await has(fronts.first, n) for n in (1, 2, 3)]
        assert found == [b"one two ", b"", b"said without a dispatcher"]
        await fronts.clients[1].close()
        assert await has(fronts.first) == b"one two "


async def test_whoever_stops_waiting_leaves_nothing_that_runs() -> None:
    async with Cluster(0) as cluster, Fronts(cluster) as fronts:
        asked = asyncio.create_task(fronts.first.begin("o", 1, lambda: None))
        while not fronts.clients[0]._asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await say(fronts.second, b"one")
        await until(lambda: not cluster.server._histories.running)


async def test_all_sessions_of_an_owner_run() -> None:
    async with Cluster(0) as cluster, Fronts(cluster) as fronts:
        for session in (1, 2):
            await fronts.first.begin("o", session, lambda: None)
        with pytest.raises(Overloaded):
            await fronts.second.begin("o", 3, lambda: None)
