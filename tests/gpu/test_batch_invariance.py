"""Batch-invariant mode in bf16: a token's numbers are the same to the bit, whatever runs beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import workloads

from kernels.invariant_attention import SPAN, invariant_attention
from kernels.invariant_linear import invariant_linear
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank, run_to_completion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of the 8B shape, and others: inputs that no tile divides, few outputs.
WEIGHTS = [(6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (1000, 4104), (640, 8192)]
COUNTS = (1, 2, 15, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 300, 512, 513, 777)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), WEIGHTS)
def test_a_row_of_a_product_is_the_same_among_any_number(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    random_ = torch.Generator("cuda").manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=random_, device="cuda").to(dtype)
    bias = torch.randn(outputs, generator=random_, device="cuda").to(dtype)
    x = torch.randn(1100, inputs, generator=random_, device="cuda").to(dtype)
    whole = invariant_linear(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert ((whole.double() - exact).norm() / exact.norm()).item() < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    wrong = [n for n in COUNTS if not torch.equal(invariant_linear(x[:n], weight, bias), whole[:n])]
    assert wrong == []
    order = torch.randperm(1100, generator=random_, device="cuda")
    assert torch.equal(invariant_linear(x[order], weight, bias), whole[order])
    assert torch.equal(invariant_linear(x[order[:90]], weight, bias), whole[order[:90]])


def test_a_row_of_a_product_in_fp32() -> None:
    x, weight = torch.randn(300, 2048, device="cuda"), torch.randn(640, 2048, device="cuda")
    whole = invariant_linear(x, weight)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, atol=1e-3, rtol=1e-4)
    assert all(torch.equal(invariant_linear(x[:n], weight), whole[:n]) for n in (1, 31, 33, 256, 257))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (28, 4, 128), (8, 8, 64), (8, 1, 80), (4, 2, 256)]
)
def test_a_token_attends_alike_in_a_prompt_in_a_chunk_and_as_a_decode(
    heads: int, kv_heads: int, size: int, window: int, dtype: torch.dtype
) -> None:
    length, blocks = 5 * SPAN + 77, 120
    random_ = torch.Generator("cuda").manual_seed(heads * size)
    caches = [torch.randn(blocks, 16, kv_heads, size, generator=random_, device="cuda").to(dtype) for _ in range(2)]
    tables = torch.randperm(blocks, generator=random_, device="cuda").int().view(1, -1)
    q = torch.randn(length, heads, size, generator=random_, device="cuda").to(dtype)

    def prompt(first: int, last: int) -> torch.Tensor:
        at = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
        kv = torch.tensor([last], dtype=torch.int32, device="cuda")
        return invariant_attention(q[first:last], *caches, tables, at, kv, last - first, length, size**-0.5, window)

    def decodes(positions: list[int], longest: int) -> torch.Tensor:
        kv = torch.tensor(positions, dtype=torch.int32, device="cuda") + 1
        of_each = tables.expand(len(positions), -1)
        return invariant_attention(q[positions], *caches, of_each, None, kv, 1, longest, size**-0.5, window)

    whole = prompt(0, length)
    assert whole.isfinite().all()
    for first, last in ((0, 1), (0, 40), (33, 700), (700, 709), (SPAN, length), (length - 1, length)):
        assert torch.equal(prompt(first, last), whole[first:last]), (first, last)
    positions = [0, 1, 15, 63, 64, 255, 256, 511, 512, 600, 1023, 1279, 1280, length - 1]
    for longest in (length, 8192):  # one bound has other numbers of programs than the other
        assert torch.equal(decodes(positions, longest), whole[positions])
        assert torch.equal(decodes(positions[-1:], longest), whole[positions[-1:]])
    many = [random.Random(i).randrange(length) for i in range(300)]
    assert torch.equal(decodes(many, length), whole[many])


@pytest.fixture(scope="module")
def make_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rank]:
    """Two layers of the 8B shape with random weights in bf16."""
    folder: Path = tmp_path_factory.mktemp("llama-8b-2")
    (folder / "config.json").write_text(json.dumps({**workloads.CONFIG, "num_hidden_layers": 2}))

    def make(**limits: Any) -> Rank:
        engine = EngineConfig(**{"batch_invariant": True, "max_num_seqs": 40, "num_blocks": 600, **limits})
        return Rank(ReplicaConfig(ModelConfig(str(folder), "llama", load_format="dummy"), engine, device="cuda"))

    return make


def requests() -> list[EngineRequest]:
    rng = random.Random(3)
    lengths = [rng.choice((1, 7, 16, 40, 130, 300, 700, 1100)) for _ in range(60)]
    own = [tuple(rng.randrange(10, 127_990) for _ in range(n)) for n in lengths]
    prompts = [ids for i, one in enumerate(own) for ids in ((one, (*one, 7, 8, 9)) if i % 6 == 0 else (one,))]
    return [EngineRequest(str(i), ids, SamplingParams(10, temperature=0.0)) for i, ids in enumerate(prompts)]


def test_texts_alone_batched_and_replayed_are_the_same(make_rank: Callable[..., Rank]) -> None:
    """In large steps and in small ones, with graphs and without, chunked, preempted, out of the prefix cache."""
    asked, rng = requests(), random.Random(4)
    rank = make_rank(max_num_batched_tokens=1024)
    alone = {one.id: run_to_completion(rank.make_engine(), [one])[one.id] for one in asked}
    assert len({tuple(text) for text in alone.values()}) > 40
    assert run_to_completion(rank.make_engine(), asked) == alone
    cut = {one.id: rng.randrange(1, 10) for one in asked}
    again = [replace(one, resumed_ids=tuple(alone[one.id][: cut[one.id]])) for one in asked]
    rest = {name: text[cut[name] :] for name, text in alone.items()}
    assert run_to_completion(rank.make_engine(), again) == rest
    rank.close()
    other = make_rank(max_num_batched_tokens=200, cuda_graphs=False, num_blocks=100)
    limits: dict[str, Any] = {"num_blocks": other.num_blocks, "max_model_len": other.max_model_len}
    engine = Engine(other.config.engine, other.runner, vocab_size=other.vocab_size, watermark=0, **limits)
    assert run_to_completion(engine, asked) == alone
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_hits > 0
    assert run_to_completion(other.make_engine(), again) == rest
    other.close()
