"""Blocks that go to host memory and come back: the same bits on one rank, the same tokens on two, also of searches.

Mutants seen to fail: copies in before copies out; the last layer left out.
"""

from __future__ import annotations

import functools
import random
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from thread_ranks import on_ranks
from tiny import VOCAB, checkpoint, replica

from workers.api.config import KVCacheSpec
from workers.api.errors import EngineFault
from workers.api.request import BeamParams, EngineRequest, SamplingParams
from workers.api.wire import FrameCodec
from workers.engine.plan import StepHandle, StepPlan
from workers.execution import swap
from workers.execution.cache import allocate
from workers.execution.pinned import HostBuffers
from workers.execution.runner import Runner
from workers.execution.swap import HostCache
from workers.parallel.group import Groups
from workers.rank import Rank, run_to_completion

SMALL = {"block_size": 4, "num_blocks": 24, "max_num_seqs": 8}
COPY = {"eviction_type": "copy", "num_cpu_blocks": 90}


@pytest.mark.parametrize("staging", [1, 1 << 20])
def test_blocks_come_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch, staging: int) -> None:
    monkeypatch.setattr(swap, "STAGING_BYTES", staging)
    specs = [
        KVCacheSpec(layers=(0, 2), num_kv_heads=2, head_size=8, dtype="bfloat16"),
        KVCacheSpec(layers=(1,), num_kv_heads=1, head_size=5, dtype="float32"),
    ]
    caches = allocate(specs, 9, 4, torch.device("cpu"))
    tensors = [t for cache in caches for t in (cache.key, cache.value)]
    for t in tensors:
        t.copy_(torch.randn(t.shape))
    before = [t.clone() for t in tensors]
    host = HostCache(caches, 3)
    buffers = HostBuffers(pinned=False)
    host.copy([(7, 2), (1, 0)], [], buffers)
    for t in tensors:
        t[[7, 1]] = torch.nan
    host.copy([(5, 1)], [(2, 1), (1, 7), (0, 5)], buffers)  # 5 is read before it is written
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t[[1, 7, 5]], old[[7, 5, 1]])
        others = [0, 2, 3, 4, 6, 8]
        assert torch.equal(t[others], old[others])


def asked() -> list[EngineRequest]:
    """Two rounds of chats that share nothing, greedy, seeded and searched: the second finds nothing on the device."""
    rng = random.Random(3)
    made = []
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(rng.randint(14, 30))) for _ in range(6)]
    for number, prompt in enumerate(prompts * 2):
        seeded = {"temperature": 1.5, "seed": 40 + number % 6}
        sampling: dict[str, Any] = {"temperature": 0.0} if number % 6 % 2 else seeded
        beams = BeamParams(3) if number % 6 == 5 else None
        made.append(EngineRequest(f"r{number}", prompt, SamplingParams(max_tokens=14, **sampling), beams=beams))
    return made


class Pair:
    """Rank 0's executor: each plan goes over the wire to the other rank, too."""

    def __init__(self, own: Runner, other: SimpleQueue[bytes]) -> None:
        self.own, self.other = own, other
        self.codec = FrameCodec({0: StepPlan})

    def submit(self, plan: StepPlan) -> StepHandle:
        self.other.put(self.codec.encode(plan)[4:])
        return self.own.submit(plan)


@functools.cache
def serve(size: int, **engine: Any) -> tuple[dict[str, list[int]], int]:
    """The tokens of all, and how many blocks came back."""
    path = checkpoint("llama")
    plans: SimpleQueue[bytes] = SimpleQueue()

    def work(number: int, groups: Groups) -> tuple[dict[str, list[int]], int]:
        config = replica(path, tensor_parallel=size, step_ahead=False, **engine)
        rank = Rank(config, rank=number, groups=groups if size > 1 else None)
        if number:
            codec = FrameCodec({0: StepPlan})
            while body := plans.get():
                rank.runner.submit(codec.decode(body)).result()
            return {}, 0
        made = rank.make_engine(Pair(rank.runner, plans) if size > 1 else None)
        found = run_to_completion(made, asked())
        plans.put(b"")
        made.check_ledgers()
        assert made.load().free_blocks == made.load().total_blocks
        return found, made.roster.host.copied_in

    return on_ranks(size, work)[0]


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_tokens_as_with_room_for_all(size: int) -> None:
    expected, none = serve(1, block_size=4, num_blocks=400)
    got, copied = serve(size, **SMALL, **COPY)
    assert got == expected
    assert none == 0
    assert copied > 20


def test_a_plan_with_copies_needs_host_blocks() -> None:
    rank = Rank(replica(checkpoint("llama"), **SMALL))
    with pytest.raises(EngineFault, match="copies blocks"):
        rank.runner.submit(StepPlan(0, (), (), (), copies_out=((1, 0),))).result()
