"""The demo model answers the same by every way through the engine: greedy requests with transformers' tokens, sampled
ones with the tokens and log-probabilities that they get alone. Two ranks: tests/ray/test_tensor_parallel_ray.py; the
Triton kernels: tests/kernels/interpreter/test_demo_interpreted.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from demo_reference import (
    COUNT,
    EOS,
    FOLDER,
    MAX_NEW,
    answers,
    choices,
    generate,
    make_prompts,
    model,
    prompts,
    stored,
    weights_digest,
)
from demo_requests import (
    EVERY,
    SAMPLED,
    VARIED,
    Answer,
    differing,
    of_transformers,
    preempt_often,
    replayed,
    requests,
    sampled,
    serve,
    serve_alone,
)
from tiny import replica

from router.qos.config import Account, QosConfig, Tier
from router.qos.ledger import Prices
from router.qos.steps import StepOrder, step_limits
from workers.api.philox import exponential
from workers.api.request import EngineRequest
from workers.engine.core import Engine
from workers.engine.sequence import Sequence
from workers.rank import Rank

FEW = 40


@dataclass(frozen=True)
class Way:
    """One way through the engine. `a_step`: how many requests arrive a step (None: all at the start)."""

    engine: dict[str, Any] = field(default_factory=dict)
    num_blocks: int | None = None
    watermark: int = 64
    threaded: bool = False
    a_step: int | None = None
    preempt_every: int | None = None
    tiers: bool = False  # every third request is of a higher tier than the others, and takes their slots

    def run(self, asked: list[EngineRequest], ran_again: list[int]) -> tuple[Engine, dict[str, Answer]]:
        """The engine and its answers; `ran_again`: see `watch_searches`."""
        if self.tiers:
            asked = [replace(one, owner="vip" if i % 3 == 2 else f"low{i % 2}") for i, one in enumerate(asked)]
        limits = {"cache_bytes_cpu": 64 << 20, "max_num_seqs": 64, "num_blocks": self.num_blocks, **self.engine}
        rank = Rank(replica(FOLDER, **limits), threaded=self.threaded)
        engine = Engine(
            rank.config.engine,
            rank.runner,
            num_blocks=rank.num_blocks,
            max_model_len=rank.max_model_len,
            vocab_size=rank.vocab_size,
            watermark=self.watermark,
            ordering=two_tiers() if self.tiers else None,
            num_host_blocks=rank.num_host_blocks,
        )
        if self.preempt_every is not None:
            preempt_often(engine, self.preempt_every)
        watch_searches(engine, ran_again)
        try:
            return engine, serve(engine, asked, self.a_step)
        finally:
            rank.close()


def watch_searches(engine: Engine, ran_again: list[int]) -> None:
    """`ran_again` gets the tokens that each commit of a search's sequence has run again."""
    commit = engine._committer._commit_one

    def watched(sequence: Sequence, run: Any, answer: Any, tally: Any) -> None:
        before = tally.overhead
        commit(sequence, run, answer, tally)
        if sequence.is_part:
            ran_again.append(tally.overhead - before)

    engine._committer._commit_one = watched  # type: ignore[method-assign]


def two_tiers() -> StepOrder:
    top, low = Tier(0, "top"), Tier(1, "low")
    accounts = (Account(top, "vip", 1.0), Account(low, "low0", 3.0), Account(low, "low1", 1.0))
    limits = step_limits(Prices(), step_tokens=64, pool_tokens=4096, context=64, tau=1e9)  # whatever the machine
    return StepOrder(QosConfig((top, low), accounts), limits)


TINY: dict[str, Any] = {
    "num_blocks": 128,
    "watermark": 0,
}  # of 4 tokens: little over the longest prompt
WAYS = {
    "mixed": Way(),
    "mixed, each step awaited": Way({"step_ahead": False}),
    "arriving by and by, in a thread": Way(threaded=True, a_step=2),
    "chunked": Way({"max_num_batched_tokens": 64, "block_size": 32}),
    "chunked, each step awaited": Way({"max_num_batched_tokens": 40, "max_num_seqs": 24, "step_ahead": False}),
    "no prefix cache": Way({"prefix_caching": False, "block_size": 64}),
    "tiny pool": Way({"block_size": 4}, **TINY),
    "tiny pool, each step awaited": Way({"block_size": 4, "step_ahead": False}, **TINY),
    "tiers": Way({"max_num_batched_tokens": 128, "max_num_seqs": 12}, a_step=2, threaded=True, tiers=True),
    "tiers, tiny pool": Way({"block_size": 4, "max_num_seqs": 24}, **TINY, a_step=1, tiers=True),
    "preempted all the time": Way(
        {"max_num_batched_tokens": 128, "prefix_caching": False}, watermark=0, threaded=True, a_step=1, preempt_every=2
    ),
    "preempted all the time, copied": Way(
        {"block_size": 4, "eviction_type": "copy", "num_cpu_blocks": 400}, **TINY, threaded=True, preempt_every=2
    ),
}
FAST = (
    "mixed",
    "arriving by and by, in a thread",
    "chunked, each step awaited",
    "tiny pool, each step awaited",
    "tiers",
    "preempted all the time",
    "preempted all the time, copied",
)
SLOW = [name for name in WAYS if name != "tiny pool, each step awaited"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def alone(count: int) -> dict[str, Answer]:
    """Each request by itself, nothing cached before it."""
    rank = Rank(replica(FOLDER, cache_bytes_cpu=64 << 20, prefix_caching=False))
    return serve_alone(rank.make_engine(), requests(count))


def check_way(name: str, count: int) -> None:
    way = WAYS[name]
    of_searches: list[int] = []
    engine, got = way.run(requests(count), of_searches)
    assert differing(got, alone(count)) == {}
    load = engine.load()
    least = count // 8 if way.num_blocks or way.tiers else count if way.preempt_every else 0
    assert load.preemptions >= least
    if isinstance(engine.ordering, StepOrder):
        ledger = engine.ordering.policy.ledger
        assert (ledger.missing, ledger.executed) == (0, engine.stats.executed)
    if engine.config.prefix_caching:
        assert load.prefix_hits > 0
        assert sum(one.cached_tokens for one in got.values()) > 0
    host = engine.roster.host
    assert (min(host.copied_out, host.copied_in) > count) is (engine.config.eviction_type == "copy")
    ran_again = way.num_blocks is not None or way.preempt_every is not None or way.tiers
    assert (engine.stats.overhead > sum(of_searches)) is (engine.config.step_ahead or ran_again)


def check_alone(count: int) -> None:
    greedy = {name: one for name, one in alone(count).items() if name.startswith("g")}
    assert differing(greedy, of_transformers(count)) == {}


def check_asked_again(count: int) -> None:
    """Twice in the same engine, the second time out of the cache; then as replays of half an answer."""
    asked = requests(count)
    rank = Rank(replica(FOLDER, cache_bytes_cpu=64 << 20, max_num_seqs=64))
    engine = rank.make_engine()
    assert differing(serve(engine, asked), alone(count)) == {}
    hits = engine.load().prefix_hits
    again = serve(engine, asked)
    assert differing(again, alone(count)) == {}
    for one in asked:  # all but the last, part-filled block
        assert again[one.answer_ids[0]].cached_tokens >= len(one.prompt_ids) - 16
    assert engine.load().prefix_hits - hits >= sum(one.cached_tokens for one in again.values())
    resumed = replayed(asked, alone(count))
    rest = serve(engine, resumed)
    begun = {name: len(one.resumed_ids) for one in resumed for name in one.answer_ids}
    for name, one in rest.items():
        one.tokens = alone(count)[name].tokens[: begun[name]] + one.tokens
        one.logprobs = alone(count)[name].logprobs[: begun[name]] + one.logprobs
    assert sum(begun.values()) > count
    assert differing(rest, alone(count)) == {}


def test_40_prompts_alone_give_the_tokens_of_transformers() -> None:
    check_alone(FEW)


@pytest.mark.parametrize("name", FAST)
def test_40_prompts_by_way(name: str) -> None:
    check_way(name, FEW)


def test_40_prompts_asked_again_and_replayed() -> None:
    check_asked_again(FEW)


@pytest.mark.slow
def test_200_prompts_alone_give_the_tokens_of_transformers() -> None:
    check_alone(COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_200_prompts_by_every_way(name: str) -> None:
    check_way(name, COUNT)


@pytest.mark.slow
def test_200_prompts_asked_again_and_replayed() -> None:
    check_asked_again(COUNT)


def test_the_reference_is_of_these_weights() -> None:
    assert stored()["weights"] == weights_digest(), f"compute it again: {stored()['command']}"
    assert len(prompts()) == len(answers()) == COUNT
    # Far above the rounding of fp32, so that no token hangs on the order of a sum.
    assert stored()["smallest_margin"] > 1e-4


@pytest.mark.parametrize("index", [0, 19, 23, 81, 164])
def test_the_reference_is_what_transformers_says(index: int) -> None:
    assert generate(prompts()[index])[0] == answers()[index]


@pytest.mark.slow
def test_the_whole_reference_is_what_transformers_says() -> None:
    """A forward pass over prompt and answer instead of `generate`: the same statement for a tenth of the time."""
    assert make_prompts(COUNT) == prompts()
    wrong = [
        i for i, (ids, answer) in enumerate(zip(prompts(), answers(), strict=True)) if choices(ids, answer) != answer
    ]
    assert wrong == []
    ends = [answer.index(EOS) + 1 if EOS in answer else MAX_NEW for answer in answers()]
    assert ends == [len(answer) for answer in answers()]


def test_the_prompts_are_of_many_lengths_and_the_answers_end() -> None:
    lengths = sorted(map(len, prompts()))
    assert lengths[0] <= 12
    assert lengths[-1] > 350
    assert len(set(lengths)) > 60
    for some in (answers()[:FEW], answers()):
        ended = sum(tokens[-1] == EOS for tokens in some)
        assert len(some) // 3 < ended < len(some)


def test_sampled_answers_differ_from_greedy_ones_and_between_choices() -> None:
    got = alone(FEW)
    pairs = [(got[f"s{i}"].tokens, got[f"g{i}"].tokens[:SAMPLED]) for i in range(0, FEW, EVERY)]
    assert sum(one != other for one, other in pairs) > len(pairs) // 2
    three = [sampled(i * EVERY) for i, varied in enumerate(VARIED) if "choice" in varied]
    assert [one.sampling.choice for one in three] == [0, 1, 2]
    assert len({(one.prompt_ids, one.sampling.seed) for one in three}) == 1
    assert len({tuple(got[one.id].tokens) for one in three}) == 3


@torch.inference_mode()
def test_sampled_tokens_are_drawn_from_the_logits_of_transformers() -> None:
    """The definition, end to end: the greatest of logits / temperature + Gumbel noise, in transformers' own logits."""
    for index in (0, EVERY * len(VARIED)):
        one = sampled(index)
        seed, choice, start = one.sampling.seed, one.sampling.choice, len(one.prompt_ids)
        tokens = alone(FEW)[one.id].tokens
        logits = model()(torch.tensor([[*one.prompt_ids, *tokens]])).logits[0, start - 1 : -1].double()
        for at, row in enumerate(logits):
            row = row / one.sampling.temperature
            noise = [-math.log(exponential(seed, choice, start + at, token)) for token in range(len(row))]
            assert int((row + torch.tensor(noise)).argmax()) == tokens[at], (index, at)
