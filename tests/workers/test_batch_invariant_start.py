"""Batch-invariant mode starts where it can be promised, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BASE, checkpoint, generate, prompt, reference, replica, request

from kernels.attention_tile import ScoreOptions
from kernels.invariant_linear import padded_cost
from kernels.paged_decode import paged_decode_reference
from kernels.paged_prefill import paged_prefill_reference
from workers.api.config import ReplicaConfig
from workers.api.errors import ConfigError
from workers.execution.graphs import sizes, worth_capturing
from workers.layers.attention import Attention
from workers.quant.method import BatchInvariantLinear
from workers.rank import Rank, _check_invariance, run_to_completion


def config() -> ReplicaConfig:
    return replica(checkpoint("llama"), batch_invariant=True)


def test_the_cpu_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.rank.use_triton", lambda _tensor: False)
        with pytest.raises(ConfigError, match="batch_invariant needs a CUDA device: products on a cpu"):
            Rank(config())


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with kernels, as far as loading goes."""
    monkeypatch.setattr("workers.rank.use_triton", lambda _tensor: True)
    monkeypatch.setattr(Rank, "_warm_up", lambda _self: None)


@pytest.mark.usefixtures("promised")
def test_all_products_of_a_model_are_of_that_kind() -> None:
    rank = Rank(config())
    layer = rank.model.model.layers[0]
    assert isinstance(layer.self_attn.attention, Attention)
    for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        assert isinstance(linear.method, BatchInvariantLinear)
    with pytest.raises(RuntimeError, match="no batch-invariant product on cpu"):
        layer.self_attn.o_proj(torch.zeros(2, 64))
    with pytest.raises(RuntimeError, match="no batch-invariant product on cpu"):
        rank.model.compute_logits(torch.zeros(2, 64))
    assert rank.runner.state.batch_invariant
    assert not Rank(replica(checkpoint("llama"))).runner.state.batch_invariant


@pytest.mark.usefixtures("promised")
def test_steps_run_by_these_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch in their place: chunks of prompts beside decodes, hits of the prefix cache, a replay."""
    for name in ("quant.method", "layers.embedding"):
        monkeypatch.setattr(f"workers.{name}.invariant_linear", torch.nn.functional.linear)
    for name in ("quant.method.linear", "layers.embedding.linear", "layers.attention.paged_decode",
                 "layers.attention.paged_prefill", "layers.attention.dense_prefill"):  # fmt: skip
        monkeypatch.setattr(f"workers.{name}", None)
    decodes: list[bool] = []

    def attend(
        q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: torch.Tensor, cu_query: torch.Tensor | None,
        kv_lens: torch.Tensor, max_query: int, max_kv: int, scale: float, window: int, *, out: torch.Tensor,
        rows: torch.Tensor | None = None, options: ScoreOptions,
    ) -> None:  # fmt: skip
        decodes.append(cu_query is None)
        assert max_kv >= int(kv_lens.max())
        if cu_query is None:
            assert max_query == 1
            paged_decode_reference(q, key, value, tables, kv_lens, scale, window, out, None, rows, options)
        else:
            assert max_query >= int(cu_query.diff().max())
            paged_prefill_reference(q, key, value, tables, cu_query, kv_lens, scale, window, out, None, options)

    monkeypatch.setattr("kernels.invariant_attention.invariant_attention", attend)
    rank = Rank(replica(checkpoint("llama"), batch_invariant=True, max_num_batched_tokens=32, max_num_seqs=8))
    asked = [request(str(i), prompt(n), max_tokens=4) for i, n in enumerate((5, 40, 33))]
    asked.append(request("hit", (*prompt(40), 7), max_tokens=4))
    engine = rank.make_engine()
    got = run_to_completion(engine, asked)
    assert got == {one.id: generate(reference("llama"), one.prompt_ids, 4) for one in asked}
    again = replace(asked[1], resumed_ids=tuple(got["1"][:2]))
    assert run_to_completion(engine, [again]) == {"1": got["1"][2:]}
    engine.check_ledgers()
    assert engine.stats.prefix_hits > 0
    assert len(set(decodes)) == 2


@pytest.mark.usefixtures("promised")
def test_what_has_no_such_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel = 1"):
        _check_invariance(torch.device("cpu"), 2)
    plain = config()
    with pytest.raises(ConfigError, match="native models without experts"):
        Rank(replace(plain, model=replace(plain.model, implementation="transformers")))
    mixtral = {**BASE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
               "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    with pytest.raises(ConfigError, match="native models without experts"):
        Rank(replica(tmp_path, load_format="dummy", batch_invariant=True))


def test_graphs_have_the_sizes_of_tiles() -> None:
    """A step of fewer tokens takes as long."""
    ladder = sizes(300, {256: 8, 1024: 16})
    assert worth_capturing(ladder, padded_cost) == [16, 32, 64, 128, 256, 300]
