"""Long prompts go to the library's attention, everything else to ours, every token to exactly one of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kernels.dense_prefill import UNIT, DensePrompts, calls_of, calls_up_to
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
    plain, dense = (_Pieces.of(flat, dense=on) for on in (False, True))  # type: ignore[arg-type]
    longer = [(c, n) for c, n in lengths if c > 1]
    assert (plain.dense, plain.padding) == ((), 0)
    for pieces in (plain, dense):
        assert pieces.cu_query.tolist() == [0, *np.cumsum([c for c, _ in longer]).tolist()]
    assert plain.lens.tolist() == [n for _, n in longer]

    # Attention of a piece: its last tokens of `len` positions, or a dense prompt, or nothing.
    seen: dict[int, tuple[int, int]] = {}  # token: (slot, position)
    for i, (slot, length) in enumerate(zip(dense.seqs.tolist(), dense.lens.tolist(), strict=True)):
        begin, end = dense.cu_query[i : i + 2].tolist()
        for token in range(begin, end) if length else ():
            seen[token] = slot, length - (end - token)
        assert not length or end - begin <= dense.max_query
    for call in dense.dense:
        assert call.length % UNIT == 0
        assert call.padding < UNIT
        assert call.number == 1 or not call.padding
        assert call._replace(first=0, padding=0) in calls_up_to(len(flat.positions))  # type: ignore[attr-defined]
        assert call.first + call.rows <= dense.cu_query[-1] + dense.padding
        for token in range(call.first, call.first + call.tokens):
            assert token not in seen
            seen[token] = -1, (token - call.first) % call.length
    positions = flat.positions[flat.decodes :].tolist()  # type: ignore[attr-defined]
    assert [seen[i][1] for i in range(len(positions))] == positions
    owners = [slot for slot, (c, _) in enumerate(lengths) if c > 1 for _ in range(c)]
    assert all(seen[i][0] in (-1, owner) for i, owner in enumerate(owners))
    whole = [c for c, n in longer if c == n >= 1024]
    assert [h.length for h in dense.dense for _ in range(h.number)] == [-(-c // UNIT) * UNIT for c in whole]
    assert (dense.max_query > 0) == any(c != n or c < 1024 for c, n in longer)


def test_neighbours_of_one_length_share_a_call() -> None:
    one, seven = (512, 1024), [(2048 + 1536 * i, 1536) for i in range(7)]
    assert calls_of([one, *seven]) == tuple(
        DensePrompts(*call) for call in [(512, 1, 1024), (2048, 4, 1536), (8192, 2, 1536), (11264, 1, 1536)]
    )
    assert calls_of([(0, 1024), (1025, 1024)]) == (DensePrompts(0, 1, 1024), DensePrompts(1025, 1, 1024))
    assert calls_of([]) == ()


def test_a_padded_prompt_is_alone() -> None:
    found = calls_of([(0, 1100), (1100, 1536), (2636, 1100), (3736, 1100)])
    assert found == (
        DensePrompts(0, 1, 1536, 436), DensePrompts(1100, 1, 1536), DensePrompts(2636, 1, 1536, 436),
        DensePrompts(3736, 1, 1536, 436),
    )  # fmt: skip
    assert [call.tokens for call in found] == [1100, 1536, 1100, 1100]


def test_calls_are_all_that_fit_in_a_step() -> None:
    assert calls_up_to(1023) == []
    assert [(c.number, c.length) for c in calls_up_to(4000)] == [
        (1, 1024), (2, 1024), (1, 1536), (2, 1536), (1, 2048), (1, 2560), (1, 3072), (1, 3584), (1, 4096),
    ]  # fmt: skip
