"""A start that stands still ends, and says at which rank and where."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any

import pytest

from cluster import gang as gang_module
from cluster.gang import Gang
from cluster.rank_actor import Started
from workers.api.errors import EngineFault
from workers.api.replica import BYTES, UP, ReplicaInfo, Stage

INFO = ReplicaInfo("r0", "m", "host", 1, 4096, 8, num_blocks=64, block_size=16)


class Method:
    """What an actor's method looks like to its caller."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class Rank:
    """Starts when `up` is set; `stages` are what it says meanwhile, the last one again and again."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.up = asyncio.Event()
        self.stages, self.last = iter(stages), Stage("")
        self.asked = 0
        self.killed = False
        self.start, self.stage, self.call_meeting = Method(self._start), Method(self._stage), Method(self._meet)

    async def _meet(self) -> None:
        return None

    async def _start(self, meeting: None) -> Started:
        await self.up.wait()
        return Started(INFO, 100, {})

    async def _stage(self) -> Stage:
        self.asked += 1
        self.last = next(self.stages, self.last)
        return self.last


class Silent(Rank):
    """Never says where it is."""

    async def _stage(self) -> Stage:
        self.asked += 1
        await asyncio.Event().wait()
        return Stage("")


def busy() -> Rank:
    """Loads for ever."""
    return Rank(Stage("weights", number, 10**9, BYTES) for number in count())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(rank: Rank) -> None:
        rank.killed = True

    monkeypatch.setattr(gang_module, "PULSE_SECONDS", 0.001)
    monkeypatch.setattr("ray.kill", kill)


def gang_of(*ranks: Rank, clock: Callable[[], float]) -> Gang:
    gang = Gang.__new__(Gang)  # the constructor starts actors
    gang.ranks, gang._id, gang._start_patience, gang._clock = list(ranks), "r0", 20.0, clock  # type: ignore[assignment]
    return gang


async def test_the_rank_that_stands_still_is_named_with_its_stage() -> None:
    """Time passes only as the other rank, which goes on, is asked."""
    ranks = busy(), Rank([Stage("imports"), Stage("weights", 1 << 29, 1 << 30, BYTES)])
    with pytest.raises(EngineFault, match=r"^the start of rank 1 has stood still for 20 s: weights, 0\.5 of 1\.0 GiB$"):
        await gang_of(*ranks, clock=lambda: ranks[0].asked).start()
    assert all(rank.killed for rank in ranks)


async def test_a_rank_that_never_answers_is_named() -> None:
    seconds = count()
    rank = Silent([])
    with pytest.raises(EngineFault, match=r"^the start of rank 0 has stood still for 20 s: no answer yet$"):
        await gang_of(rank, clock=lambda: next(seconds)).start()
    assert rank.asked == 1


async def test_a_start_that_goes_on_may_take_long() -> None:
    """Also one whose first rank is up and waits for the other."""
    early, slow = Rank([UP]), busy()
    early.up.set()
    gang = gang_of(early, slow, clock=lambda: slow.asked)
    start = asyncio.create_task(gang.start())
    while slow.asked < 100 and not start.done():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert not start.done()
    slow.up.set()
    assert await start == INFO
    assert gang.pids == [100, 100]
    await asyncio.sleep(0)
    assert not [t for t in asyncio.all_tasks() if "_stands_still" in repr(t)]
