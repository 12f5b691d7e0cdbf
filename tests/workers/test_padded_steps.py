"""Padded steps, as graphs capture them, on the CPU: they draw what steps without padding draw, and touch no more."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import added, prompt, rank_of, run

from kernels.tuning import make_table
from workers.engine.plan import StepPlan
from workers.execution import padded as padded_module
from workers.execution.flat import FlatStep
from workers.execution.graphs import StepGraphs, sizes, worth_capturing
from workers.execution.padded import PaddedInputs, PaddedStep, StepShape
from workers.rank import Rank

LENGTHS = (14, 3, 21, 7)


def plans() -> list[StepPlan]:
    """Four prompts, one in chunks; decodes of some and of all beside; a chunk of one token that draws nothing."""
    ids = [prompt(n, seed=n) for n in LENGTHS]
    blocks = [(0, 1), (2, 3), (4, 5), (6, 7)]
    new = [added(i, ids[i], blocks[i]) for i in range(4)]
    return [
        StepPlan(0, (), (new[0], new[1]), (run(0, 0, 14), run(1, 0, 3))),
        StepPlan(1, (), (new[2],), (run(0, 14, 1), run(1, 3, 1), run(2, 0, 16, emit=0))),
        StepPlan(2, (), (), (run(0, 15, 1), run(1, 4, 1), run(2, 16, 1, emit=0))),
        StepPlan(3, (), (new[3],), (run(0, 16, 1), run(1, 5, 1), run(2, 17, 4), run(3, 0, 7))),
        StepPlan(4, (), (), tuple(run(i, n, 1) for i, n in enumerate((17, 6, 21, 7)))),
        StepPlan(5, (1,), (), tuple(run(i, n, 1) for i, n in ((3, 8), (0, 18), (2, 22)))),
    ]


def buffer_for(shape: StepShape) -> torch.Tensor:
    return torch.empty(PaddedInputs.bytes_needed(shape), dtype=torch.uint8)


def run_padded(rank: Rank, shape_of: Any) -> list[list[int]]:
    state, out = rank.runner.state, []
    for plan in plans():
        with torch.inference_mode():
            flat = state.flatten(plan)
            state.upload_changes(flat)
            shape = shape_of(flat)
            step = PaddedStep(rank.model, rank.runner.caches, state, shape, buffer_for(shape))
            step.inputs.fill(flat)
            step.run()
        assert rank.model.gather_logits(step.own_logits).shape == (shape.emits, rank.vocab_size)
        out.append(step.tokens[: len(flat.emit_at)].tolist())
    return out


def mixed(flat: FlatStep) -> StepShape:
    return replace(StepShape.mixed(flat.num_tokens + 5, 9), prefills=3)


def exact_or_mixed(flat: FlatStep) -> StepShape:
    alone = flat.decodes == flat.num_tokens == len(flat.emit_at)
    most = min(flat.num_tokens, 9)
    exact = StepShape(flat.num_tokens, most, len(flat.query) or 1, most)
    return StepShape.decode(flat.num_tokens) if alone else exact


def padded_decode(flat: FlatStep) -> StepShape:
    alone = flat.decodes == flat.num_tokens == len(flat.emit_at)
    return StepShape.decode(flat.num_tokens + 3) if alone else mixed(flat)


@pytest.mark.parametrize("ordered_from", [1, 256], ids=["longest-first", "as-they-come"])
@pytest.mark.parametrize("shape_of", [mixed, exact_or_mixed, padded_decode])
@pytest.mark.parametrize("model", ["llama", "mistral-window"])
def test_padded_steps_draw_the_same_and_store_nothing_else(
    model: str, shape_of: Any, ordered_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded_module, "ORDERED_FROM", ordered_from)
    ranks = [rank_of(model, num_blocks=12) for _ in range(2)]
    for rank in ranks:
        with torch.inference_mode():
            for cache in rank.runner.caches:
                cache.key.fill_(torch.nan)
                cache.value.fill_(torch.nan)
    want = [[s.token_ids[0] for s in ranks[0].runner.submit(plan).result().slots] for plan in plans()]
    assert run_padded(ranks[1], shape_of) == want
    for one, other in zip(ranks[0].runner.caches, ranks[1].runner.caches, strict=True):
        torch.testing.assert_close(one.key, other.key, equal_nan=True, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.value, other.value, equal_nan=True, atol=1e-5, rtol=1e-5)
    tables = [rank.runner.state.token_table[:-1] for rank in ranks]
    assert torch.equal(*tables)


def test_sizes_go_up_to_the_most_and_no_further() -> None:
    assert sizes(1, {64: 8}) == [1]
    assert sizes(5, {64: 8}) == [1, 2, 4, 5]
    assert sizes(23, {64: 8}) == [1, 2, 4, 8, 16, 23]
    assert sizes(100, {32: 8, 128: 32}) == [1, 2, 4, 8, 16, 24, 32, 64, 96, 100]
    for most in (64, 128, 250, 256, 300, 1024):
        ladder = sizes(most, {256: 8, 1024: 16})
        assert ladder == sorted(set(ladder))
        assert ladder[-1] == most
        assert all(above <= max(below + 16, 2 * below) for below, above in pairwise(ladder))


def test_no_size_is_captured_for_which_a_greater_one_is_as_quick() -> None:
    cost = {16: 5.0, 32: 7.0, 48: 6.0, 64: 9.0, 80: 9.0, 96: 12.0}
    assert worth_capturing([8, *cost], cost.get) == [8, 16, 48, 80, 96]
    assert worth_capturing([1, 2, 4], cost.get) == [1, 2, 4]
    table = make_table({
        "decode": (), "prefill": (), "gemv": (),
        "products": [{"outputs": 3, "inputs": 2, "microseconds": {"16": 1.5, "32": 2.0}}],
    })  # fmt: skip
    assert table.product_microseconds([(3, 2), (3, 2)], 16) == 3.0
    assert table.product_microseconds([(3, 2), (2, 3)], 16) is None
    assert table.product_microseconds([(3, 2)], 17) is None


def test_a_step_finds_the_least_shape_that_holds_it() -> None:
    rank = rank_of("llama", max_num_seqs=20)
    state = rank.runner.state
    graphs = StepGraphs(rank.model, rank.runner.caches, state, limit=64, group=rank.groups.tp)
    found = [graphs.shape_for(state.flatten(plan)) for plan in plans()]
    # 17 tokens of two prompts; 18; a decode that draws nothing; 13, of them two prompts; decodes alone
    want = [StepShape.mixed(n, 20) for n in (32, 32, 16, 32)] + [StepShape.decode(4)] * 2
    assert found == want
    new = added(7, prompt(90), tuple(range(8, 12)))
    assert graphs.shape_for(state.flatten(StepPlan(9, (), (new,), (run(7, 0, 64, emit=0),)))) == StepShape.mixed(64, 20)
    assert graphs.shape_for(state.flatten(StepPlan(9, (7,), (new,), (run(7, 0, 65, emit=0),)))) is None


def test_many_short_prompts_fit_no_shape() -> None:
    rank = rank_of("llama", max_num_seqs=20)
    state = rank.runner.state
    graphs = StepGraphs(rank.model, rank.runner.caches, state, limit=64, group=rank.groups.tp)
    new = tuple(added(i, prompt(3, seed=i), (i,)) for i in range(5))
    flat = state.flatten(StepPlan(0, (), new, tuple(run(i, 0, 3) for i in range(5))))
    assert graphs.shape_for(flat) is None
    assert not StepShape.mixed(64, 20).holds(flat)
    assert StepShape.mixed(80, 20).holds(flat)
