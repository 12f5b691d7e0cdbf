"""Who is to blame when a rank hangs: the gang's pulse, with ranks that are no actors."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster import gang as gang_module
from cluster.gang import Gang
from cluster.starved import Delays


class Method:
    """What an actor's method looks like to its caller."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self.remote = call


class Rank:
    """Runs until `end` is set; answers pings with `step_age`, or not at all while it is `stopped`."""

    def __init__(self) -> None:
        self.stopped = False
        self.step_age = 0.0
        self.pings = 0
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.run = Method(lambda: self.end)
        self.ping = Method(self._ping)

    async def _ping(self) -> float:
        self.pings += 1
        while self.stopped:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return self.step_age


def gang_of(*ranks: Rank, silence: float = 0.1, patience: float = 5.0) -> Gang:
    gang = Gang.__new__(Gang)  # the constructor starts actors
    gang._silence = silence
    gang.ranks, gang.pids, gang._patience = list(ranks), [100 + i for i in range(len(ranks))], patience  # type: ignore[arg-type]
    gang._id, gang._here = "r1", [False] * len(ranks)
    return gang


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_module, "PULSE_SECONDS", 0.01)
    monkeypatch.setattr(gang_module, "LINGER_SECONDS", 0.01)
    monkeypatch.setattr(gang_module, "BLAME_SECONDS", 0.2)


async def running(gang: Gang, *ranks: Rank) -> asyncio.Task[str]:
    """`gang.run`, which has seen some pulses of each rank and goes on."""
    run = asyncio.create_task(gang.run())
    seen = [rank.pings for rank in ranks]
    while any(rank.pings < before + 3 for rank, before in zip(ranks, seen, strict=True)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not run.done()
    return run


async def test_a_stopped_rank_is_named() -> None:
    ranks = Rank(), Rank()
    run = await running(gang_of(*ranks), *ranks)
    ranks[1].stopped = True
    assert await run == "rank 1 (pid 101) has not answered for 0.1 s"


async def test_a_starved_rank_is_not_a_hung_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a processor for as long as it is silent; then it gets one, and hangs."""
    rank = Rank()
    gang = gang_of(rank)
    gang._here = [True]
    starving, looks, last = True, 0, 0.0

    def delays(pid: int) -> Delays:
        nonlocal looks, last
        looks += 1
        last = time.monotonic() if starving else last
        return {"1": last}

    monkeypatch.setattr(gang_module, "delays_of", delays)
    monkeypatch.setattr(gang_module, "SHORTEST_LOOK", 0.01)
    rank.stopped = True
    run = asyncio.create_task(gang.run())
    while looks < 40:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not run.done(), "silent for several times its patience"
    starving = False
    assert await run == "rank 0 (pid 100) has not answered for 0.1 s"


async def test_a_silent_rank_is_named_in_the_log_long_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gang_module, "NAMED_SECONDS", 0.02)
    ranks = Rank(), Rank()
    run = await running(gang_of(*ranks, silence=60.0), *ranks)
    ranks[1].stopped = True
    named = "replica r1 rank 1 (pid 101) is silent for 0.02 s"
    while named not in caplog.messages:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    ranks[1].stopped = False
    assert not run.done()
    run.cancel()


async def test_a_rank_in_one_step_for_too_long_is_named() -> None:
    rank = Rank()
    rank.step_age = 0.05  # long, not too long
    run = await running(gang_of(rank), rank)
    rank.step_age = 7.0
    assert await run == "rank 0 (pid 100) is in one step for 7 s"


async def test_a_silent_rank_is_named_before_the_one_that_waits_for_it() -> None:
    ranks = Rank(), Rank()
    run = await running(gang_of(*ranks, silence=5.0), *ranks)
    ranks[1].stopped, ranks[0].step_age = True, 7.0
    assert await run == "rank 1 does not answer; rank 0 (pid 100) is in one step for 7 s"


async def test_a_rank_that_ends_is_told_by_its_end() -> None:
    ranks = Rank(), Rank()
    run = await running(gang_of(*ranks, silence=60.0), *ranks)
    ranks[1].stopped = True
    ranks[0].end.set_exception(RuntimeError("a step failed"))
    assert await run == "rank 1 does not answer; rank 0 ended: RuntimeError: a step failed"
    await asyncio.sleep(0)
    assert "_pulse" not in {getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks()}


async def test_the_end_of_a_rank_that_nobody_waits_for_is_no_news() -> None:
    """The gang gave up on a stopped rank; killed, it fails the calls that were under way there."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    ranks = Rank(), Rank()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ping() -> float:
        await failed
        return 0.0

    run = await running(gang_of(*ranks), *ranks)
    ranks[1].ping = Method(ping)
    assert await run == "rank 1 (pid 101) has not answered for 0.1 s"
    for future in (failed, *(rank.end for rank in ranks)):
        future.set_exception(RuntimeError("the actor died"))
    del run, future
    await asyncio.sleep(0.01)
    gc.collect()
    assert told == []
