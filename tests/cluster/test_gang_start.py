"""A start that stands still ends, and says at which rank and where."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

from cluster import gang as gang_module
from cluster.gang import Gang
from cluster.rank_actor import UP, Started
from workers.api.errors import EngineFault
from workers.api.replica import ReplicaInfo

INFO = ReplicaInfo("r0", "m", "host", 1, 4096, 8, num_blocks=64, block_size=16)


class Method:
    """What an actor's method looks like to its caller."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class Rank:
    """Starts when `up` is set; `stages` are what it says meanwhile, the last one again and again."""

    def __init__(self, *stages: str) -> None:
        self.up = asyncio.Event()
        self.stages = list(stages)
        self.silent = False
        self.killed = False
        self.start, self.stage, self.call_meeting = Method(self._start), Method(self._stage), Method(self._meet)

    async def _meet(self) -> None:
        return None

    async def _start(self, meeting: None) -> Started:
        await self.up.wait()
        return Started(INFO, 100, {})

    async def _stage(self) -> str:
        if self.silent:
            await asyncio.Event().wait()
        return self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(rank: Rank) -> None:
        rank.killed = True

    monkeypatch.setattr(gang_module, "PULSE_SECONDS", 0.002)
    monkeypatch.setattr("ray.kill", kill)


def gang_of(*ranks: Rank, patience: float = 0.05) -> Gang:
    gang = Gang.__new__(Gang)  # the constructor starts actors
    gang.ranks, gang._id, gang._start_patience = list(ranks), "r0", patience  # type: ignore[arg-type]
    return gang


async def test_the_rank_that_stands_still_is_named_with_its_stage() -> None:
    ranks = Rank(*(f"weights, {i} of 9000 tensors loaded" for i in range(9000))), Rank("imports", "weights")
    with pytest.raises(EngineFault, match=r"^the start of rank 1 has stood still for 0\.05 s: weights$"):
        await gang_of(*ranks).start()
    assert all(rank.killed for rank in ranks)


async def test_a_rank_that_never_answers_is_named() -> None:
    rank = Rank("imports")
    rank.silent = True
    with pytest.raises(EngineFault, match=r"rank 0 has stood still for 0\.05 s: no answer yet"):
        await gang_of(rank).start()


async def test_a_start_that_goes_on_may_take_long() -> None:
    """Also one whose first rank is up and waits for the other."""
    numbers = count()
    slow = Rank("")
    slow._stage = lambda: asyncio.sleep(0, f"weights, {next(numbers)} of 9000 tensors loaded")  # type: ignore[method-assign]
    slow.stage = Method(slow._stage)
    early = Rank(UP)
    early.up.set()
    gang = gang_of(early, slow)
    start = asyncio.create_task(gang.start())
    await asyncio.sleep(4 * gang._start_patience)  # far beyond the deadline
    assert not start.done()
    slow.up.set()
    assert await start == INFO
    assert gang.pids == [100, 100]
    await asyncio.sleep(0)
    assert not {t for t in asyncio.all_tasks() if "_stands_still" in repr(t)}
