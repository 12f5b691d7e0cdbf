"""Gangs on a small machine load one after another, and none waits for ever."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.start_turn import start_turn, turns_at_once


@pytest.mark.parametrize(("ranks", "cores", "turns"), [(1, 1, 1), (1, 2, 1), (1, 8, 4), (4, 8, 1), (8, 96, 6)])
def test_turns_follow_the_cores(ranks: int, cores: int, turns: int) -> None:
    assert turns_at_once(ranks, cores) == turns


@pytest.mark.parametrize("at_once", [1, 3])
async def test_no_more_than_that_load_at_once(tmp_path: Path, at_once: int) -> None:
    loading = most = 0

    async def load() -> None:
        nonlocal loading, most
        async with start_turn(at_once, folder=tmp_path):
            loading += 1
            most = max(most, loading)
            await asyncio.sleep(0.01)
            loading -= 1

    await asyncio.gather(*(load() for _ in range(6)))
    assert most == at_once


async def test_a_failed_start_gives_its_turn_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no model"):
        async with start_turn(1, folder=tmp_path):
            raise RuntimeError("no model")
    async with start_turn(1, folder=tmp_path, most_wait=0.5):
        pass


async def test_who_waited_long_starts_anyway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with start_turn(1, folder=tmp_path):
        with caplog.at_level(logging.WARNING, logger="ray.serve"):
            async with start_turn(1, folder=tmp_path, most_wait=0.1):
                pass
    assert "beside the others" in caplog.text


async def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, time; from pathlib import Path; from cluster.start_turn import start_turn\n"
        "async def main():\n"
        "    async with start_turn(1, folder=Path(sys.argv[1])):\n"
        "        print('mine', flush=True); time.sleep(600)\n"
        "asyncio.run(main())"
    )
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path), stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert await other.stdout.readline() == b"mine\n"
        waiting = asyncio.create_task(start_turn(1, folder=tmp_path).__aenter__())
        await asyncio.sleep(0.2)
        assert not waiting.done()
    finally:
        other.kill()
        await other.wait()
    await asyncio.wait_for(waiting, 30)
