"""Requests to the demo model for the tests of exactness, and how an engine is made to answer them.

For each prompt a greedy request, for every third one a sampled one too; the sampling parameters go round, so that each
filter, penalty and bias is met alone and with others. For three in every sixty a beam search.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from demo_reference import EOS, MAX_NEW, answers, prompts

from workers.api.request import BeamParams, Delta, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from workers.engine.core import Engine
from workers.engine.sequence import Sequence

SAMPLED = 12  # tokens at most
EVERY, SEARCHES_EVERY = 3, 60
# Hot, since the model is sure of most tokens.
VARIED: tuple[dict[str, Any], ...] = (
    {"temperature": 2.2},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 2.5, "top_k": 20},
    {"temperature": 2.2, "min_p": 0.05, "logprobs": 0, "logprob_ids": (900, 5, EOS)},
    {"temperature": 2.1, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 2.3, "repetition_penalty": 1.3, "top_k": 50, "top_p": 0.95},
    {"temperature": 3.5, "choice": 0, "logprobs": 3},  # three choices of one prompt
    {"temperature": 3.5, "choice": 1, "logprobs": 3},
    {"temperature": 3.5, "choice": 2, "logprobs": 3},
    {"temperature": 2.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "min_tokens": 9},
    {"temperature": 2.2, "logit_bias": ((300, 4.0), (17, -8.0), (1000, 2.5))},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 5},
    {"temperature": 2.2, "allowed_ids": tuple(range(0, 1024, 3)), "stop_ids": (EOS, 300)},
)


@dataclass
class Answer:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None

    def add(self, delta: Delta, start: int = 0) -> None:
        """The next delta; none may come after the last, and none may leave a gap."""
        assert self.finish is None, f"{delta.request_id}: a delta after the last"
        assert delta.position == start + len(self.tokens), f"{delta.request_id}: {delta}"
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish, self.cached_tokens, self.error = delta.finish, delta.cached_tokens, delta.error


def greedy(index: int, max_tokens: int = MAX_NEW) -> EngineRequest:
    """Prompt `index`, greedily."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=(EOS,))
    return EngineRequest(f"g{index}", prompts()[index], sampling)


def sampled(index: int, max_tokens: int = SAMPLED) -> EngineRequest:
    """Prompt `index` with the parameters of its turn; choices above 0 are of the prompt and seed of choice 0."""
    varied = VARIED[index // EVERY % len(VARIED)]
    asked = index - EVERY * varied.get("choice", 0)
    fields = {"max_tokens": max_tokens, "stop_ids": (EOS,), "seed": 2**63 + 977 * asked, **varied}
    return EngineRequest(f"s{index}", prompts()[asked], SamplingParams(**fields))


def search(index: int, max_tokens: int = SAMPLED) -> EngineRequest:
    """The three likeliest answers to prompt `index`."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=(EOS,), logprobs=1)
    return EngineRequest(f"b{index}", prompts()[index], sampling, beams=BeamParams(3))


def requests(count: int) -> list[EngineRequest]:
    """Greedy ones for the first `count` prompts, sampled ones and searches for some of them, mixed."""
    asked: list[EngineRequest] = []
    for i in range(count):
        asked.append(greedy(i))
        if i % EVERY == 0:
            asked.append(sampled(i))
        if i % SEARCHES_EVERY == 5:
            asked += [search(i), search(i + 1), search(i + 2)]
    return asked


def differing(got: dict[str, Answer], expected: dict[str, Answer], start: int = 0) -> dict[str, Any]:
    """By request id: what was answered and what should have been, where they are not the same."""
    assert got.keys() == expected.keys()
    return {
        name: (one.tokens, expected[name].tokens, one.finish, one.error)
        for name, one in got.items()
        if (one.tokens, one.finish) != (expected[name].tokens, expected[name].finish)
        or not same_logprobs(one.logprobs, expected[name].logprobs)
    }


def same_logprobs(ours: list[TokenLogprobs], theirs: list[TokenLogprobs], slack: float = 1e-4) -> bool:
    """Equal but for rounding; among values that are that close the order may differ."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.token_id != b.token_id or abs(a.logprob - b.logprob) > slack or len(a.top) != len(b.top):
            return False
        if any(abs(x - y) > slack for (_, x), (_, y) in zip(a.top, b.top, strict=True)):
            return False
    return True


def of_transformers(count: int) -> dict[str, Answer]:
    """The greedy answers as the reference has them."""
    out = {}
    for i, tokens in enumerate(answers()[:count]):
        finish = FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH
        out[f"g{i}"] = Answer(list(tokens), finish=finish)
    return out


def preempt_often(engine: Engine, every: int) -> None:
    """Every so many plans somebody is preempted for nothing, each four times at most.

    A small pool does not bring that about: the more often somebody was preempted, the more room he waits for.
    """
    scheduler, roster, rng, numbers = engine._scheduler, engine.roster, random.Random(5), itertools.count(1)
    make_room = scheduler._make_room

    def make_more_room() -> tuple[list[Sequence], bool]:
        decodes, preempted = make_room()
        candidates = [s for s in (*roster.residents.decoding, *roster.residents.prefilling) if s.preemptions < 4]
        if next(numbers) % every or not candidates:
            return decodes, preempted
        roster.preempt(rng.choice(candidates))
        return list(roster.residents.decoding), True

    scheduler._make_room = make_more_room  # type: ignore[method-assign]


def serve(engine: Engine, asked: Iterable[EngineRequest], a_step: int | None = None) -> dict[str, Answer]:
    """Answers by their ids. All are submitted first, or `a_step` of them before each step. Ledgers are checked."""
    got: dict[str, Answer] = {}
    waiting = list(asked)
    start = {name: len(one.resumed_ids) for one in waiting for name in one.answer_ids}

    def submit(count: int | None) -> None:
        for one in waiting[:count]:
            got.update((name, Answer()) for name in one.answer_ids)
            engine.submit(one)
        del waiting[:count]

    submit(a_step)
    while engine.has_work or waiting:
        for delta in engine.step():
            got[delta.request_id].add(delta, start[delta.request_id])
        submit(a_step)
    engine.check_ledgers()
    load = engine.load()
    assert (load.running, load.waiting, load.requests.running) == (0, 0, 0)
    assert load.free_blocks == load.total_blocks
    assert all(one.finish is not None for one in got.values())
    return got


def serve_alone(engine: Engine, asked: Iterable[EngineRequest]) -> dict[str, Answer]:
    """Each request by itself."""
    got: dict[str, Answer] = {}
    for one in asked:
        got |= serve(engine, [one])
    return got


def replayed(asked: Iterable[EngineRequest], whole: dict[str, Answer]) -> list[EngineRequest]:
    """The requests as after a death halfway: what was emitted comes with them; of a search, nothing was."""

    def half(one: EngineRequest) -> EngineRequest:
        tokens = whole[one.id].tokens
        return replace(one, resumed_ids=tuple(tokens[: len(tokens) // 2]))

    return [half(one) if one.beams is None else one for one in asked]
