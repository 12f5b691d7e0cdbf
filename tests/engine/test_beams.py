"""Beam searches in the engine: what is refused, what they count as, and who they run beside."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import fake_executor
import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB, beam_oracle, likeliest

from workers.api.errors import InvalidRequest
from workers.api.grammar import GrammarSpec
from workers.api.request import MAX_BEAMS, BeamParams, EngineRequest, FinishReason
from workers.engine.beam_search import BeamSearch

PROMPT = tuple(range(1, 11))


def search(name: str = "s", width: int = 3, max_tokens: int = 6, **fields: object) -> EngineRequest:
    asked = request(name, fields.pop("prompt", PROMPT), max_tokens, temperature=0.0, **fields)  # type: ignore
    return replace(asked, beams=BeamParams(width))


def test_all_answers_come_at_once_the_best_first_and_the_first_bears_the_counts() -> None:
    harness, asked = Harness(), search(stop_ids=(7, 9))
    harness.submit(asked)
    steps = []
    while harness.engine.has_work:
        steps.append(harness.step())
        harness.engine.check_ledgers()
    harness.check_idle()
    assert [len(deltas) for deltas in steps if deltas] == [3]
    last = [harness.receiver.last[name] for name in asked.answer_ids]
    assert [(delta.token_ids, delta.finish) for delta in last] == beam_oracle(asked, 128)
    assert (last[0].executed_prefill, last[0].cached_tokens) == (len(PROMPT), 0)
    assert last[0].executed_decode > 0
    assert {(d.executed_prefill, d.executed_decode) for d in last[1:]} == {(0, 0)}


def test_beams_keep_their_sequences_while_nobody_waits() -> None:
    """Mutant seen to fail: those that have drawn are given up before the others of the step have."""
    harness = Harness()
    harness.submit(search(width=5, max_tokens=20), request("plain", PROMPT, 20))
    harness.drain()
    assert sum(len(plan.added) for plan in harness.executor.plans) == 5 + 1
    assert harness.engine.stats.overhead == 4 * (len(PROMPT) % 4)  # what the others share no block of


def sharp(tokens: Sequence[int], count: int) -> tuple[tuple[int, float], ...]:
    """As `likeliest`, of a model that is nearly sure: one beam may overtake the others late."""
    scores = [byte / 2 for byte in hashlib.blake2b(bytes(tokens), digest_size=VOCAB).digest()]
    whole = math.log(sum(math.exp(score) for score in scores))
    ranked = sorted(range(VOCAB), key=lambda token: -scores[token])
    return tuple((token, scores[token] - whole) for token in ranked[:count])


@pytest.mark.parametrize("model", [likeliest, sharp])
def test_what_stands_is_what_the_whole_search_would_find(
    model: Callable[[Sequence[int], int], tuple[tuple[int, float], ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many ends, all penalties: a search may be over before the greatest length, but no better answer may come then.

    Mutants seen to fail: over when no beam can reach the best answer; the bound of one sign of penalty for the other.
    """
    monkeypatch.setattr(fake_executor, "likeliest", model)
    rng, early = random.Random(5), 0
    for number in range(150):
        stops = tuple(rng.sample(range(VOCAB), rng.choice([8, 20, 32])))
        params = BeamParams(rng.choice([2, 3, 4, 8]), rng.choice([-0.4, -0.15, 0.15, 0.5, 1.0]))
        asked = replace(search(prompt=(number,), max_tokens=rng.randint(6, 12), stop_ids=stops), beams=params)
        if number % 5 == 4:  # as wide as can be, with a least length
            params = BeamParams(VOCAB - 40, 1.0)
            limits = replace(asked.sampling, max_tokens=rng.randint(1, 4), min_tokens=1, stop_ids=tuple(range(40)))
            asked = replace(asked, sampling=limits, beams=params)
        beams = BeamSearch(params, asked.sampling, asked.sampling.max_tokens)
        while True:
            beams.advance([model(asked.prompt_ids + b.token_ids, beams.candidates) for b in beams.running])
            if beams.is_over:
                break
        early += bool(beams.running)
        assert [(b.token_ids, b.finish) for b in beams.answers] == beam_oracle(asked, 128), asked
    assert early > 20


def test_a_search_counts_as_one_request_whatever_runs_of_it() -> None:
    harness = Harness()
    harness.submit(search(width=5), request("plain", PROMPT))
    for _ in range(4):
        harness.step()
    counts = harness.engine.load().requests
    assert (counts.accepted, counts.running) == (2, 2)
    harness.drain()
    counts = harness.engine.load().requests
    assert (counts.accepted, counts.completed) == (2, 2)
    assert harness.engine.load().prefix_queries == 2 * len(PROMPT)


def test_the_prompt_is_computed_once_and_found_by_the_next_search() -> None:
    harness = Harness()
    harness.submit(search("a"))
    harness.drain()
    harness.submit(search("b"))
    harness.drain()
    last = harness.receiver.last["b/0"]
    assert (last.cached_tokens, last.executed_prefill) == (8, 2)
    full, longest = 4, 6
    assert harness.engine.stats.overhead <= 2 * 3 * longest * (full - 1)  # of each beam's last block, no more


@pytest.mark.parametrize("name", ["s", "s/0", "s/2"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_an_abort_by_any_of_its_ids_ends_it(name: str, steps: int) -> None:
    harness, asked = Harness(), search(max_tokens=20)
    harness.submit(asked)
    for _ in range(steps):
        harness.step()
    harness.engine.abort(name)
    harness.engine.check_ledgers()
    harness.drain()
    assert {harness.receiver.finish(name) for name in asked.answer_ids} == {FinishReason.ABORT}
    assert harness.engine.load().requests.aborted == 1
    harness.submit(search("again"))
    harness.drain()


def test_an_abort_of_what_runs_of_it_is_one_of_an_unknown_id() -> None:
    """Nobody outside knows of its sequences, and nobody is told of their ends."""
    harness, asked = Harness(), search()
    harness.submit(asked)
    for _ in range(2):
        harness.step()
    for name in list(harness.engine.roster.live):
        harness.engine.abort(name)
    harness.drain()
    assert {harness.receiver.finish(name) for name in asked.answer_ids} == {FinishReason.LENGTH}


def test_a_fault_of_one_beam_ends_the_search_and_nobody_else() -> None:
    harness, asked = Harness(fault=lambda seed, position: seed == 5 and position == 13), search(seed=5)
    harness.submit(asked, request("plain", PROMPT, seed=1))
    harness.drain()
    for name in asked.answer_ids:
        assert "not finite" in (harness.receiver.last[name].error or "")
    assert harness.receiver.finish("plain") is FinishReason.LENGTH
    assert harness.engine.load().requests.failed == 1


def test_who_came_later_does_not_go_ahead_of_its_next_tokens() -> None:
    """One slot: between two tokens of the search it is free, and others have waited for it since its first step."""
    harness = Harness(max_num_seqs=1)
    harness.submit(search(max_tokens=4), *(request(f"p{i}", PROMPT, 2) for i in range(3)))
    order: list[str] = []
    while harness.engine.has_work:
        order += [delta.request_id for delta in harness.step() if delta.finish is not None]
        harness.engine.check_ledgers()
    assert order == ["s/0", "s/1", "s/2", "p0", "p1", "p2"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"presence_penalty": 1.0},
        {"logit_bias": ((1, 1.0),)},
        {"bad_words": ((1,),)},
        {"allowed_ids": (1, 2)},
        {"top_k": 3},
    ],
)
def test_what_would_have_no_say_is_refused(fields: dict[str, object]) -> None:
    asked = search()
    with pytest.raises(InvalidRequest, match="limits and stop ids"):
        Harness().engine.submit(replace(asked, sampling=replace(asked.sampling, **fields)))  # type: ignore[arg-type]


def test_grammars_replays_and_widths_that_cannot_be_are_refused() -> None:
    engine, asked = Harness().engine, search()
    for wrong in (replace(asked, resumed_ids=(1,)), replace(asked, grammar=GrammarSpec("regex", "a"))):
        with pytest.raises(InvalidRequest):
            engine.submit(wrong)
    for width in (0, MAX_BEAMS + 1):
        with pytest.raises(InvalidRequest, match=f"1 to {MAX_BEAMS} beams, got {width}"):
            engine.submit(search(width=width))
    with pytest.raises(InvalidRequest, match="1 to 14 beams"):
        engine.submit(search(width=15, stop_ids=tuple(range(VOCAB - 14))))
    for penalty in (10.5, -1000.0, math.inf, math.nan):  # a length to that power may be none, or not to be divided by
        with pytest.raises(InvalidRequest, match="length penalty"):
            engine.submit(replace(asked, beams=BeamParams(3, penalty)))
    engine.submit(asked)
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(asked)
    engine.abort("s")
    assert not engine.load().requests.running
