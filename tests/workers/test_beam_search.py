"""Beam search beside that of transformers, on tiny checkpoints in fp32: the same answers in the same order."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tiny import prompt, rank_of, reference, request

from workers.api.request import BeamParams, Delta, EngineRequest, FinishReason
from workers.engine.core import Engine

MOST = 14
STOPS = tuple(range(3, 301, 6))  # so many that answers of all lengths end with one


def search(name: str, ids: tuple[int, ...], width: int, penalty: float = 1.0, **sampling: Any) -> EngineRequest:
    asked = request(name, ids, **{"max_tokens": MOST, **sampling})
    return replace(asked, beams=BeamParams(width, penalty))


def run(engine: Engine, *asked: EngineRequest) -> dict[str, Delta]:
    """All their last deltas; the tokens of plain requests are put together."""
    tokens: dict[str, tuple[int, ...]] = {}
    last: dict[str, Delta] = {}
    for one in asked:
        engine.submit(one)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] = tokens.get(delta.request_id, ()) + delta.token_ids
            if delta.finish is not None:
                last[delta.request_id] = replace(delta, token_ids=tokens[delta.request_id])
        engine.check_ledgers()
    return last


def answers(engine: Engine, asked: EngineRequest) -> list[tuple[int, ...]]:
    last = run(engine, asked)
    return [last[name].token_ids for name in asked.answer_ids]


def transformers_answers(name: str, asked: EngineRequest) -> list[tuple[int, ...]]:
    assert asked.beams is not None
    tokens, stops = torch.tensor([asked.prompt_ids]), asked.sampling.stop_ids
    with torch.inference_mode():
        rows = reference(name).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=asked.sampling.max_tokens,
            min_new_tokens=asked.sampling.min_tokens or None,
            num_beams=asked.beams.width,
            num_return_sequences=asked.beams.width,
            length_penalty=asked.beams.length_penalty,
            early_stopping="never",
            do_sample=False,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
        )
    found = []
    for row in rows[:, len(asked.prompt_ids) :].tolist():
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        found.append(tuple(row[: ends[0]] if ends else row))
    return found


def test_answers_are_those_of_transformers() -> None:
    engine = rank_of("llama").make_engine()
    lengths = set()
    pairs = ((2, 1.0), (4, -1.0), (4, 0.0), (7, 2.5))
    for (width, penalty), stops, length in product(pairs, ((), STOPS), (3, 37)):
        asked = search(f"{width}-{penalty}-{len(stops)}-{length}", prompt(length), width, penalty, stop_ids=stops)
        found = answers(engine, asked)
        assert found == transformers_answers("llama", asked), asked
        lengths |= {len(answer) for answer in found}
    assert {1, 2, 3, MOST} < lengths


def test_other_families_and_a_least_length() -> None:
    for name in ("qwen3", "mistral-window"):
        engine = rank_of(name).make_engine()
        asked = search(name, prompt(30), 4, stop_ids=STOPS, min_tokens=5)
        found = answers(engine, asked)
        assert found == transformers_answers(name, asked)
        assert min(len(answer) for answer in found) > 5


def test_one_beam_is_greedy() -> None:
    engine = rank_of("llama").make_engine()
    plain = request("plain", prompt(20), max_tokens=MOST)
    last = run(engine, plain)
    assert answers(engine, search("one", prompt(20), 1)) == [last["plain"].token_ids]


@pytest.mark.parametrize("settings", [{"prefix_caching": False}, {"num_blocks": 9}, {"max_num_seqs": 2}])
def test_answers_do_not_depend_on_cache_pool_or_slots(settings: dict[str, Any]) -> None:
    """With nine blocks of 16 the search cannot run beside the others: it, or they, must yield."""
    asked = search("s", prompt(40), 4, stop_ids=STOPS, logprobs=2)
    alone = run(rank_of("llama").make_engine(), asked)
    others = [request(f"o{i}", prompt(30 + i), max_tokens=20) for i in range(5)]
    beside = run(rank_of("llama", **settings).make_engine(), *others[:3], asked, *others[3:])
    for name in asked.answer_ids:
        assert (beside[name].token_ids, beside[name].finish) == (alone[name].token_ids, alone[name].finish)
        for one, other in zip(beside[name].logprobs, alone[name].logprobs, strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    plain = run(rank_of("llama").make_engine(), *others)
    assert [beside[o.id].token_ids for o in others] == [plain[o.id].token_ids for o in others]


def test_log_probabilities_are_those_of_each_token_and_of_the_prompt() -> None:
    engine = rank_of("llama").make_engine()
    asked = search("s", prompt(20), 3, logprobs=1, prompt_logprobs=1)
    last = run(engine, asked)
    with torch.inference_mode():
        for place, name in enumerate(asked.answer_ids):
            tokens = asked.prompt_ids + last[name].token_ids
            whole = reference("llama")(torch.tensor([tokens])).logits[0].log_softmax(-1)
            for at, one in enumerate(last[name].logprobs, start=len(asked.prompt_ids)):
                row = whole[at - 1]
                assert one.token_id == tokens[at]
                assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
                assert one.rank == 1 + int((row > row[one.token_id]).sum())
                assert [token for token, _ in one.top] == [int(row.argmax())]
            assert len(last[name].prompt_logprobs) == (0 if place else 19)
    sums = [sum(one.logprob for one in last[name].logprobs) for name in asked.answer_ids]
    assert sums == sorted(sums, reverse=True)
    assert {last[name].finish for name in asked.answer_ids} == {FinishReason.LENGTH}
