"""Steps replayed from CUDA graphs give what steps launched kernel by kernel give, token for token, in fp32."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest
from workers.engine.core import Engine
from workers.execution.graphs import CapturedStep
from workers.rank import Rank

sys.path.append(str(Path(__file__).parents[1] / "workers"))  # the demo model's prompts
from demo_reference import FOLDER, prompts
from demo_requests import (
    Answer,
    differing,
    greedy,
    of_transformers,
    preempt_often,
    replayed,
    requests,
    sampled,
    serve,
)

COUNT = 200

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, tokens of the shape) of every replayed step."""
    seen: list[tuple[int, int]] = []
    replay = CapturedStep.replay

    def counting(self: CapturedStep, flat: Any) -> None:
        seen.append((flat.num_tokens, self.step.shape.tokens))
        replay(self, flat)

    monkeypatch.setattr(CapturedStep, "replay", counting)
    return seen


@functools.cache
def rank_of(**engine: Any) -> Rank:
    limits = {"num_blocks": 4096, "max_num_seqs": 64, **engine}
    config = ReplicaConfig(ModelConfig(str(FOLDER), "demo", dtype="float32"), EngineConfig(**limits), device="cuda")
    return Rank(config)


@functools.cache
def launched() -> dict[str, Answer]:
    """All requests without graphs."""
    return serve(rank_of(cuda_graphs=False).make_engine(), requests(COUNT))


def thousand() -> list[EngineRequest]:
    """200 greedy requests and 800 sampled ones, mixed, with every sampling parameter."""
    mixed = []
    for i in range(COUNT):
        mixed.append(greedy(i))
        for turn in range(4):
            one = sampled(i)
            seed = int(one.sampling.seed or 0) + 31 * turn
            mixed.append(replace(one, id=f"{one.id}-{turn}", sampling=replace(one.sampling, seed=seed)))
    return mixed


def test_a_thousand_mixed_requests(replays: list[tuple[int, int]]) -> None:
    asked = thousand()
    assert len(asked) == len({one.id for one in asked}) == 1000
    expected = serve(rank_of(cuda_graphs=False).make_engine(), asked)
    assert replays == []
    assert differing(serve(rank_of().make_engine(), asked), expected) == {}
    assert len(replays) > COUNT


def test_without_graphs_the_greedy_ones_are_those_of_transformers(replays: list[tuple[int, int]]) -> None:
    got = {name: one for name, one in launched().items() if name.startswith("g")}
    assert differing(got, of_transformers(COUNT)) == {}
    assert replays == []


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"step_ahead": False},
        {"max_num_batched_tokens": 64, "block_size": 32},
        {"max_num_seqs": 23, "max_num_batched_tokens": 40},
        {"prefix_caching": False, "max_num_batched_tokens": 4096},
        {"block_size": 4, "num_blocks": 128},
    ],
)
def test_graphs_give_the_same(limits: dict[str, Any], replays: list[tuple[int, int]]) -> None:
    rank = rank_of(**limits)
    engine = Engine(
        rank.config.engine,
        rank.runner,
        num_blocks=rank.num_blocks,
        max_model_len=rank.max_model_len,
        vocab_size=rank.vocab_size,
        watermark=0 if rank.num_blocks == 128 else 64,
    )
    assert differing(serve(engine, requests(COUNT)), launched()) == {}
    assert len(replays) > COUNT // 4
    assert any(tokens < padded for tokens, padded in replays)
    if rank.num_blocks == 128:
        assert engine.load().preemptions >= COUNT // 8
    if engine.config.prefix_caching:
        assert engine.load().prefix_hits > 0


def test_preempted_all_the_time(replays: list[tuple[int, int]]) -> None:
    engine = rank_of().make_engine()
    preempt_often(engine, 2)
    assert differing(serve(engine, requests(COUNT), a_step=1), launched()) == {}
    assert engine.load().preemptions >= COUNT // 2
    assert replays


def test_asked_again_and_replayed_out_of_the_prefix_cache(replays: list[tuple[int, int]]) -> None:
    engine, asked = rank_of().make_engine(), requests(COUNT)
    serve(engine, asked)
    again = serve(engine, asked)
    assert differing(again, launched()) == {}
    assert all(again[one.answer_ids[0]].cached_tokens >= len(one.prompt_ids) - 16 for one in asked)
    resumed: list[EngineRequest] = replayed(asked, launched())
    rest = serve(engine, resumed)
    for one in resumed:
        begun = len(one.resumed_ids)
        if not begun:  # a search
            continue
        rest[one.id].tokens = launched()[one.id].tokens[:begun] + rest[one.id].tokens
        rest[one.id].logprobs = launched()[one.id].logprobs[:begun] + rest[one.id].logprobs
    assert differing(rest, launched()) == {}
    assert replays


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 17, 31, 64])
def test_padded_batches_write_to_nowhere(count: int, replays: list[tuple[int, int]]) -> None:
    rank = rank_of(num_blocks=8192, prefix_caching=False)
    with torch.inference_mode():
        for cache in rank.runner.caches:
            cache.key.fill_(torch.nan)
            cache.value.fill_(torch.nan)
    asked = [greedy(i) for i in range(count)]
    got = serve(rank.make_engine(), asked)
    assert differing(got, {one.id: launched()[one.id] for one in asked}) == {}
    used = sum(-(-(len(prompts()[i]) + len(got[f"g{i}"].tokens)) // 16) for i in range(count))
    for cache in rank.runner.caches:  # blocks are handed out from the first on
        assert cache.key[used:].isnan().all()
        assert cache.value[used:].isnan().all()
    assert any(tokens == padded for tokens, padded in replays) or count not in (1, 2, 8, 64)
