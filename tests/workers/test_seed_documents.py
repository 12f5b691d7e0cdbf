"""The documents of 2023-24 that say how a model is added: every code block of them has its counterpart, and it runs.

By document, number and title of the section, in the order of the blocks:

lmdeploy, "How to support new model in lmdeploy.pytorch" (both editions):
 1 Support New Model, the stack's forward          test_lmdeploy_1_the_stack_is_rewritten
 2 Support New Model, attention in five steps      test_lmdeploy_2_attention_in_five_steps
 3 Support New Model, the map                      test_lmdeploy_1_..., test_lmdeploy_2_... (both register)
 4 Tensor Parallelism, partition                   test_lmdeploy_4_to_6_two_ranks
 5 Tensor Parallelism, sum of outputs              test_lmdeploy_4_to_6_two_ranks
 6 Tensor Parallelism, the map                     test_lmdeploy_4_to_6_two_ranks
 7 to 10 Debug Module (later edition), all blocks  test_lmdeploy_7_to_10_one_module_is_debugged
 11 Appendix, context info                         test_lmdeploy_11_the_step_context_has_every_documented_field
 12 FAQ, remote code by abbreviation               test_lmdeploy_12_abbreviations (and test_patch.py)
 13 FAQ, several modules under one name            test_lmdeploy_13_variants_by_attribute
 14 FAQ, after loading                             test_lmdeploy_14_update_after_loading
 Architecture, "Patching": its two blocks are 2 and 3 again

CacheFlow, "Adding a New Model":
 2 Rewrite the forward methods                     test_cacheflow_a_model_in_one_file
 3 to 5 have no code blocks; parallel layers, loading and registration are exercised by the same test
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from add_a_model import blocks, muse_checkpoint
from foreign import VOCAB, assert_logits, checkpoint, rank_over, reference, step_logits, steps_of
from tiny import generate, prompt, request
from torch import nn

from kernels.kv_cache import store_kv
from workers.align.tools import make_step_context
from workers.models.patch_map import MODULE_MAP
from workers.models.plain_attention import PlainAttention
from workers.models.sharding import column_parallel, row_parallel
from workers.parallel.group import Group
from workers.rank import run_to_completion

LONG, SHORT = prompt(24, vocab=VOCAB), prompt(6, vocab=VOCAB)
LLAMA = "transformers.models.llama.modeling_llama"


class Stack(nn.Module):
    """The least that the stack's forward needs."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        rotation = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotation)
        return types.SimpleNamespace(last_hidden_state=self.norm(hidden))


class FiveSteps(nn.Module):
    """Projections, rotation, cache, attention, output projection, each in the open."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> Any:
        step = self.context.context
        tokens, size = hidden_states.shape[1], self.head_dim
        q, k, v = (p(hidden_states)[0].view(tokens, -1, size) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (x[0, :, None] for x in position_embeddings)
        q, k = (x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin for x in (q, k))
        cache = step.kv_caches[self.layer_idx] if step.kv_caches else None
        if cache is None:  # the pass at the start, before there are caches
            return self.o_proj(self.noted(q, k, v).flatten(2)), None
        store_kv(k.contiguous(), v.contiguous(), cache.key, cache.value, step.slots, {})
        out = torch.empty_like(q)
        inner = PlainAttention(self.layer_idx, q.shape[1], k.shape[1], size, scale=self.scaling)
        for n in range(len(step.seq_length)):
            start, count = int(step.q_start_loc[n]), int(step.seq_length[n])
            assert int(step.history_lengths[n]) == int(step.kv_seq_length[n]) - count
            rows = [
                c[step.block_offsets[n].long()].flatten(0, 1)[: step.kv_seq_length[n]] for c in (cache.key, cache.value)
            ]
            out[start : start + count] = inner._one(q[start : start + count], *rows, None)
        return self.o_proj(out.flatten(1)[None]), None

    def noted(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from workers.models.paged import paged_attention

        return paged_attention(self, *(x.transpose(0, 1)[None] for x in (q, k, v)), scale=self.scaling)


class SplitAttention(FiveSteps):
    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        if mod_name in ("q_proj", "k_proj", "v_proj"):
            column_parallel(mod, device_mesh)
        elif mod_name == "o_proj":
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: Any, device_mesh: Group) -> Any:
        device_mesh.all_reduce(outputs[0])
        return outputs


class SplitMLP(nn.Module):
    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        if mod_name in ("gate_proj", "up_proj"):
            column_parallel(mod, device_mesh)
        elif mod_name == "down_proj":
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: Any, device_mesh: Group) -> Any:
        return device_mesh.all_reduce(outputs)


def assert_equal_to_transformers(size: int = 1) -> None:
    got = step_logits(checkpoint("llama"), steps_of(LONG, SHORT), size=size)
    assert_logits(got, "llama", LONG, SHORT)


def test_lmdeploy_1_the_stack_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaModel", Stack)
    assert_equal_to_transformers()


def test_lmdeploy_2_attention_in_five_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaAttention", FiveSteps)
    assert_equal_to_transformers()


def test_lmdeploy_4_to_6_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaAttention", SplitAttention)
    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaMLP", SplitMLP)
    assert_equal_to_transformers(size=2)


def test_lmdeploy_7_to_10_one_module_is_debugged() -> None:
    code = blocks()["one_module.py"]
    exec(compile(code, "one_module.py", "exec"), {"FOLDER": str(checkpoint("llama"))})
    broken = code.replace("scale=attention.scaling", "scale=attention.scaling * 1.1")
    assert broken != code
    with pytest.raises(AssertionError, match="not close"):
        exec(compile(broken, "one_module.py", "exec"), {"FOLDER": str(checkpoint("llama"))})


def test_lmdeploy_11_the_step_context_has_every_documented_field() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    context = make_step_context(
        ids, [3, 2], [0, 7], num_key_value_heads=2, head_size=4, num_layers=2, block_size=4, world_size=2
    )
    assert context.inputs.tolist() == context.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert context.position_ids.tolist() == [context.position_ids_1d.tolist()] == [[0, 1, 2, 7, 8]]
    assert context.q_start_loc.tolist() == [0, 3]
    assert context.history_lengths.tolist() == [0, 7]
    assert context.seq_length.tolist() == context.q_seq_length.tolist() == [3, 2]
    assert context.max_seq_length == 3
    assert context.kv_seq_length.tolist() == [3, 9]
    assert context.block_offsets.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert context.slots.tolist() == [0, 1, 2, 4 * 4 + 3, 5 * 4]
    assert len(context.kv_caches) == 2
    assert (context.is_decoding, context.world_size, context.json_config) == (False, 2, {})
    adapters = (context.local_adapter_ids, context.global_adapter_ids, context.adapter_offsets, context.max_rank)
    assert adapters == (None, None, None, 0)
    assert make_step_context(ids[:, :1], [1, 1], [4, 2], num_key_value_heads=2, head_size=4).is_decoding


def test_lmdeploy_12_abbreviations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODULE_MAP, f"{LLAMA}.LlamaMLP")
    monkeypatch.setitem(MODULE_MAP, "modeling_llama.LlamaMLP", SplitMLP)
    assert rank_over(checkpoint("llama")).model.patches.counts["modeling_llama.LlamaMLP"] == 2


@pytest.mark.parametrize(("layers", "factor"), [(2, 1.0), (3, 2.0)])
def test_lmdeploy_13_variants_by_attribute(monkeypatch: pytest.MonkeyPatch, layers: int, factor: float) -> None:
    class Variants(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.origin_mod(x) * (1.0 if self.config.num_hidden_layers == layers else 2.0)

    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaMLP", Variants)
    mlp = rank_over(checkpoint("llama")).model.get_submodule("model.layers.0.mlp")
    x = torch.ones(1, 1, 32)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), reference("llama").model.layers[0].mlp(x) * factor)


def test_lmdeploy_14_update_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(nn.Module):
        def _update_model_fn(self) -> None:
            self.down_proj.weight.mul_(0.5)

    monkeypatch.setitem(MODULE_MAP, f"{LLAMA}.LlamaMLP", Halved)
    got = rank_over(checkpoint("llama")).model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(got, reference("llama").model.layers[1].mlp.down_proj.weight * 0.5)


def test_cacheflow_a_model_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, want = muse_checkpoint(tmp_path)
    file = tmp_path / "muse.py"
    file.write_text(blocks()["muse.py"])
    engine = rank_over(folder, implementation="auto", model_files=(str(file),)).make_engine()
    got = run_to_completion(engine, [request("a", LONG, max_tokens=6)])
    assert got == {"a": generate(want, LONG, 6)}
    assert any(name.startswith("echelon_model_file_") for name in sys.modules)
