"""Prompts that go through cuDNN: the same attention, and beside all else that a step may hold."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.dense_prefill import is_supported, plan
from kernels.paged_dense import attend
from workers.api.request import SamplingParams
from workers.context import AttentionMetadata, ForwardContext, LayerCache, forward_context
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.execution.inputs import BatchState
from workers.layers.attention import Attention

HEADS, KV_HEADS, SIZE, BLOCK, CONTEXT = 32, 8, 128, 16, 8192

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not is_supported(torch.device("cuda"), torch.bfloat16, SIZE, 0),
        reason="needs a Hopper",
    ),
]


@pytest.fixture(scope="module")
def cache() -> LayerCache:
    shape = (2048, BLOCK, KV_HEADS, SIZE)
    made = LayerCache(*(torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)))
    plan(HEADS, made.key, CONTEXT, SIZE**-0.5)
    return made


def metadata(lengths: list[tuple[int, int]]) -> tuple[AttentionMetadata, torch.Tensor]:
    """A step of sequences with so many (new tokens, tokens known after it), and their block tables."""
    state = BatchState(
        max_num_seqs=32, max_model_len=CONTEXT, block_size=BLOCK, vocab_size=1000, device=torch.device("cuda")
    )
    state.dense_prompts = True
    free = list(range(2048))
    random.Random(len(lengths)).shuffle(free)
    added, scheduled = [], []
    for slot, (count, length) in enumerate(lengths):
        blocks = tuple(free.pop() for _ in range(-(-length // BLOCK)))
        added.append(NewSequence(slot, (1,) * length, length, SamplingParams(8, temperature=0.0), blocks))
        scheduled.append(ScheduledSequence(slot, length - count, count, 1))
    inputs = state.prepare(StepPlan(0, (), tuple(added), tuple(scheduled)))
    return inputs.attention, state.block_table[: len(lengths)].clone()


@pytest.mark.parametrize(
    "lengths",
    [
        [(1024, 1024)],
        [(2048, 2048)] * 4,
        [(1024, 1024)] * 7,
        [(8000, 8000)],
        [(1, 90), (1100, 1100), (3000, 3000), (1537, 1537)],
        [(1, 700), (1, 1), (1023, 1023), (1025, 1025), (300, 1500), (2047, 2047), (17, 17), (1536, 1536), (40, 2100)],
    ],
    ids=["one", "four", "seven", "long", "padded", "mixed"],
)
def test_dense_prompts_attend_as_the_reference_does(cache: LayerCache, lengths: list[tuple[int, int]]) -> None:
    batch, tables = metadata(lengths)
    assert batch.prefill is not None
    assert sum(call.tokens for call in batch.prefill.dense) == sum(c for c, n in lengths if c == n >= 1024)
    torch.manual_seed(0)
    for part in (cache.key, cache.value):
        part.fill_(torch.nan)
    tokens = sum(count for count, _ in lengths)
    # What earlier steps have left in the cache.
    for row, (count, length) in enumerate(lengths):
        at = torch.arange(length - count, device="cuda")
        where = tables[row][at // BLOCK].long(), at % BLOCK
        for part in (cache.key, cache.value):
            part[where] = torch.randn(len(at), KV_HEADS, SIZE, dtype=torch.bfloat16, device="cuda")
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * SIZE, dtype=torch.bfloat16, device="cuda")
    q, k, v = qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
    layer = Attention(0, HEADS, KV_HEADS, SIZE, scale=SIZE**-0.5)
    with torch.inference_mode(), forward_context(ForwardContext((batch,), (cache,))):
        out = layer(q, k, v).view(tokens, HEADS, SIZE)
    counts = torch.tensor([count for count, _ in lengths])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int().cuda()
    lens = torch.tensor([length for _, length in lengths], dtype=torch.int32, device="cuda")
    for row in range(len(lengths)):  # one at a time: the reference is dense
        span = slice(int(starts[row]), int(starts[row + 1]))
        wanted = attend(
            q[span].reshape(-1, HEADS, SIZE), cache.key, cache.value, tables[row : row + 1],
            torch.tensor([0, int(counts[row])], dtype=torch.int32, device="cuda"), lens[row : row + 1], SIZE**-0.5, 0,
            None, None,
        )  # fmt: skip
        torch.testing.assert_close(out[span], wanted, atol=2e-2, rtol=2e-2, msg=lambda m, row=row: f"{row}: {m}")
