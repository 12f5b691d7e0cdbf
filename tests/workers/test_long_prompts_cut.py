"""How long prompts are cut: heads for the library's attention, everything else for ours, every token in exactly one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kernels.dense_prefill import UNIT, Heads, adjoining, calls_up_to
from workers.api.request import SamplingParams
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.execution.inputs import BatchState, _Pieces


def flat_of(lengths: list[tuple[int, int]]) -> object:
    """A step of sequences with so many (new tokens, tokens known after it), decodes first."""
    state = BatchState(max_num_seqs=64, max_model_len=4096, block_size=16, vocab_size=100, device=torch.device("cpu"))
    added, scheduled, block = [], [], 0
    for slot, (count, length) in enumerate(lengths):
        blocks = tuple(range(block, block + -(-length // 16)))
        block += len(blocks)
        added.append(NewSequence(slot, (1,) * length, length, SamplingParams(4, temperature=0.0), blocks))
        scheduled.append(ScheduledSequence(slot, length - count, count, 1))
    return state.flatten(StepPlan(0, (), tuple(added), tuple(scheduled)))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_piece(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(1, rng.randrange(1, 3000)) for _ in range(rng.randrange(3))]
    for _ in range(rng.randrange(1, 9)):
        count = rng.choice([2, 17, 1023, 1024, 1500, 1536, 2048, 3333])
        lengths.append((count, count + rng.choice([0, 0, 16, 300])))
    flat = flat_of(lengths)
    plain, cut = (_Pieces.of(flat, cut=cut) for cut in (False, True))  # type: ignore[arg-type]
    longer = [(c, n) for c, n in lengths if c > 1]
    assert plain.heads == ()
    assert plain.cu_query.tolist() == [0, *np.cumsum([c for c, _ in longer]).tolist()]
    assert plain.lens.tolist() == [n for _, n in longer]
    assert cut.cu_query[-1] == plain.cu_query[-1]

    # Attention of a piece: its last tokens of `len` positions, or a head, or nothing.
    seen: dict[int, tuple[int, int]] = {}  # token: (slot, position)
    for i, (slot, length) in enumerate(zip(cut.seqs.tolist(), cut.lens.tolist(), strict=True)):
        begin, end = cut.cu_query[i : i + 2].tolist()
        for token in range(begin, end) if length else ():
            seen[token] = slot, length - (end - token)
    for heads in cut.heads:
        assert heads.length % UNIT == 0
        assert heads in [h._replace(first=heads.first) for h in calls_up_to(16384)]
        for token in range(heads.first, heads.first + heads.tokens):
            assert token not in seen
            seen[token] = -1, (token - heads.first) % heads.length
    positions = flat.positions[flat.decodes :].tolist()  # type: ignore[attr-defined]
    assert [seen[i][1] for i in range(len(positions))] == positions
    owners = [slot for slot, (c, _) in enumerate(lengths) if c > 1 for _ in range(c)]
    assert all(seen[i][0] in (-1, owner) for i, owner in enumerate(owners))
    whole = [c for c, n in longer if c == n >= 1024]
    assert [h.length for h in cut.heads for _ in range(h.number)] == [c // UNIT * UNIT for c in whole]
    assert cut.rest == any(c % UNIT or c != n or c < 1024 for c, n in longer)


def test_neighbours_of_one_length_share_a_call() -> None:
    one, seven = Heads(512, 1, 1024), [(2048 + 1536 * i, 1536) for i in range(7)]
    assert adjoining([(512, 1024), *seven]) == (one, Heads(2048, 4, 1536), Heads(8192, 2, 1536), Heads(11264, 1, 1536))
    assert adjoining([(0, 1024), (1025, 1024)]) == (Heads(0, 1, 1024), Heads(1025, 1, 1024))
    assert adjoining([]) == ()


def test_calls_are_all_that_fit_in_a_step() -> None:
    assert calls_up_to(1000) == []
    assert [(c.number, c.length) for c in calls_up_to(4096)] == [
        (1, 1024), (2, 1024), (4, 1024), (1, 1536), (2, 1536), (1, 2048), (2, 2048),
        (1, 2560), (1, 3072), (1, 3584), (1, 4096),
    ]  # fmt: skip
