"""Rotations scaled by each sequence's length, beyond the trained one: as transformers does it, one at a time."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tiny import added, checkpoint, generate, prompt, reference, replica, request, run

from workers.engine.plan import StepPlan
from workers.execution.padded import PaddedInputs, PaddedStep, StepShape
from workers.models.base import read_config
from workers.rank import Rank, run_to_completion

NAME, TRAINED = "llama-rope-dynamic", 256
NEW = 8


def ours(**engine: Any) -> Rank:
    config = replica(checkpoint(NAME), **{"max_num_batched_tokens": 1024, **engine})
    return Rank(dataclasses.replace(config, model=dataclasses.replace(config.model, max_model_len=512)))


def theirs(ids: tuple[int, ...]) -> list[int]:
    """A fresh copy: transformers' rotary embedding remembers the longest sequence that it has seen."""
    return generate(copy.deepcopy(reference(NAME)), ids, NEW)


LENGTHS = (10, TRAINED - 4, TRAINED + 9, 300)  # within, growing beyond, beyond from the first token on


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[int]]:
    return {str(length): theirs(prompt(length)) for length in LENGTHS}


def asked() -> list[Any]:
    return [request(str(length), prompt(length), max_tokens=NEW) for length in LENGTHS]


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 90}], ids=str)
def test_a_ragged_batch_is_each_alone_in_transformers(limits: dict[str, Any], wanted: dict[str, list[int]]) -> None:
    assert read_config(checkpoint(NAME))["max_position_embeddings"] == TRAINED
    engine = ours(**limits).make_engine()
    assert run_to_completion(engine, asked()) == wanted
    engine.check_ledgers()


def test_a_replay_rotates_what_was_emitted_as_it_was_then(wanted: dict[str, list[int]]) -> None:
    """Prompt and emitted tokens come as one piece; their keys are those of a prompt and of single steps."""
    engine = ours().make_engine()
    halves = [dataclasses.replace(one, resumed_ids=tuple(wanted[one.id][: NEW // 2])) for one in asked()]
    assert run_to_completion(engine, halves) == {name: ids[NEW // 2 :] for name, ids in wanted.items()}


def test_padded_steps_rotate_alike() -> None:
    """As CUDA graphs run them."""
    new = (added(0, prompt(270), tuple(range(18))), added(1, prompt(250), tuple(range(18, 36))))
    plans = [StepPlan(0, (), new, (run(0, 0, 270), run(1, 0, 250)))]
    plans += [StepPlan(1 + n, (), (), (run(0, 270 + n, 1), run(1, 250 + n, 1))) for n in range(8)]
    rank, padded = ours(), ours()
    for plan in plans:
        want = [slot.token_ids[0] for slot in rank.runner.submit(plan).result().slots]
        flat = padded.runner.state.flatten(plan)
        shape = StepShape.mixed(flat.num_tokens + 40, 32)
        with torch.inference_mode():
            padded.runner.state.upload_changes(flat)
            buffer = torch.empty(PaddedInputs.bytes_needed(shape), dtype=torch.uint8)
            step = PaddedStep(padded.model, padded.runner.caches, padded.runner.state, shape, buffer)
            step.inputs.fill(flat)
            step.run()
        assert step.tokens[:2].tolist() == want


def test_prompts_share_blocks_only_where_their_keys_are_the_same() -> None:
    long = prompt(300)
    engine = ours(cache_bytes_cpu=32 << 20).make_engine()

    def hits(name: str, ids: tuple[int, ...]) -> int:
        before = engine.stats.prefix_hits
        assert run_to_completion(engine, [request(name, ids, max_tokens=NEW)])[name] == theirs(ids)
        return engine.stats.prefix_hits - before

    assert hits("first", long) == 0
    assert hits("same length", (*long[:288], *prompt(12, seed=3))) == 288
    assert hits("longer", (*long, *prompt(7))) == 0
    assert hits("short", long[:40]) == 0
    assert hits("short again", (*long[:32], *prompt(9))) == 32
