"""Two ranks on two GPUs: sums through peer memory against torch's, and answers in fp32 against one rank's."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from two_gpu_rank import COUNT, FOLDER, ROWS, WAYS, WIDTHS, main, requests, serve

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.rank import Rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("two-gpus")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=main, args=(number, str(folder))) for number in range(2)]
    for process in processes:
        process.start()
    waiting, deadline = [process.sentinel for process in processes], time.monotonic() + 240
    while waiting and not any(process.exitcode for process in processes) and time.monotonic() < deadline:
        ended = wait(waiting, timeout=1.0)
        waiting = [sentinel for sentinel in waiting if sentinel not in ended]
    for process in processes:  # the one that is left waits for the other without end
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((folder / f"found{number}.json").read_text()) for number in range(2)]


def test_sums_have_the_bits_of_torchs(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["sums"]["wrong"] == []
        assert one["sums"]["replayed"] == []
    ours, theirs = (one["sums"]["hashes"] for one in found)
    assert len(ours) == 2 * len(ROWS) * len(WIDTHS)
    assert ours == theirs, "the ranks' bits differ"


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """What one rank says."""
    engine = EngineConfig(num_blocks=4096, max_num_seqs=64)
    rank = Rank(ReplicaConfig(ModelConfig(str(FOLDER), "demo", dtype="float32"), engine, device="cuda"))
    return {name: one.tokens for name, one in serve(rank.make_engine(), requests(COUNT)).items()}


@pytest.mark.parametrize("way", list(WAYS))
def test_two_ranks_say_what_one_says(way: str, found: list[dict[str, Any]], alone: dict[str, list[int]]) -> None:
    said = found[0][way]["tokens"]
    differing = {name: (said.get(name), tokens) for name, tokens in alone.items() if said.get(name) != tokens}
    assert differing == {}
    assert len(said) == len(alone) > COUNT
    replays = [one[way]["replays"] for one in found]
    assert replays[0] == replays[1], "the ranks took different ways"
    assert (replays[0] > 0) == WAYS[way][0]
