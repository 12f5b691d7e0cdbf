"""DeepSeek: the first dense and mixture-of-experts models (attention of Llama), and V2, V3 with latent attention.

Latent attention is served with keys and values expanded: the cache holds each head's, values padded to the
size of keys. That is exact, but takes the memory that the latent form would save.

Shapes: T tokens, C channels, H heads of this rank, R rotated and N other channels of a key, V of a value.
Sources: Dai et al., DeepSeekMoE, 2024; DeepSeek-V2, 2024; DeepSeek-V3, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from workers.api.errors import ConfigError
from workers.layers.attention import Attention
from workers.layers.build import Build, divide
from workers.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from workers.layers.moe import Choice
from workers.layers.norm import RMSNorm
from workers.layers.rotary import RopeSettings, RotaryEmbedding, yarn_magnitude
from workers.models.base import WeightRule, require
from workers.models.feed_forward import expert_rules, shared_rules
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings, LatentSettings, MoESettings


def _moe(config: Mapping[str, Any], choice: Choice, *, correction: bool = False) -> MoESettings:
    dense, step = int(config.get("first_k_dense_replace") or 0), int(config.get("moe_layer_freq") or 1)
    inner = int(require(config, "moe_intermediate_size"))
    return MoESettings(
        choice,
        inner,
        tuple(i >= dense and i % step == 0 for i in range(int(require(config, "num_hidden_layers")))),
        shared=inner * int(config.get("n_shared_experts") or 0),
        correction=correction,
    )


def _chosen(config: Mapping[str, Any], **changes: Any) -> Choice:
    return Choice(
        int(require(config, "n_routed_experts")), int(require(config, "num_experts_per_tok")), wide=True, **changes
    )


class DeepseekForCausalLM(LlamaForCausalLM):
    """DeepSeek-MoE-16B, and what else has this name."""

    weight_rules = (*expert_rules(), *shared_rules(), *LLAMA_RULES)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias, moe = bool(config.get("attention_bias", False)), None
        if config.get("n_routed_experts"):
            scores = str(config.get("scoring_func", "softmax"))
            moe = _moe(config, _chosen(config, scores=scores, normalize=bool(config.get("norm_topk_prob", False))))
        return DecoderSettings.from_config(config, qkv_bias=bias, output_bias=bias, moe=moe)


class LatentAttention(nn.Module):
    """Attention whose keys and values come out of one small vector a token, expanded before they are cached."""

    ends_with: ClassVar[str] = "o_proj"

    def __init__(
        self, name: str, layer: int, s: DecoderSettings, rotary: RotaryEmbedding | None, max_len: int, *, build: Build
    ) -> None:
        super().__init__()
        m = self.latent = s.latent
        assert m is not None
        self.heads = divide(s.heads, build.groups.tp.size, f"number of heads of {name}")
        self.size = m.rotated + m.plain
        inputs, queries = s.hidden, s.heads * self.size
        if m.query_rank:
            self.q_a_proj = ReplicatedLinear(f"{name}.q_a_proj", inputs, m.query_rank, bias=m.bias, build=build)
            self.q_a_layernorm = RMSNorm(m.query_rank, 1e-6, build=build)
            self.q_b_proj = ColumnParallelLinear(f"{name}.q_b_proj", m.query_rank, queries, bias=False, build=build)
        else:
            self.q_proj = ColumnParallelLinear(f"{name}.q_proj", inputs, queries, bias=False, build=build)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            f"{name}.kv_a_proj_with_mqa", inputs, m.rank + m.rotated, bias=m.bias, build=build
        )
        self.kv_a_layernorm = RMSNorm(m.rank, 1e-6, build=build)
        self.kv_b_proj = ColumnParallelLinear(
            f"{name}.kv_b_proj", m.rank, s.heads * (m.plain + m.value), bias=False, build=build
        )
        self.o_proj = RowParallelLinear(f"{name}.o_proj", s.heads * m.value, inputs, bias=m.bias, build=build)
        self.attention = Attention(layer, self.heads, self.heads, self.size, scale=s.scale, rotary=rotary)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, C], positions [T] -> [T, C]."""
        m = self.latent
        assert m is not None
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if m.query_rank else self.q_proj(x)
        latent, rotated = self.kv_a_proj_with_mqa(x).split([m.rank, m.rotated], dim=-1)
        k, v = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).split([m.plain, m.value], -1)
        # The rotated channels come first in ours; where they stand does not change a score.
        q = q.unflatten(-1, (self.heads, -1)).roll(m.rotated, dims=-1)
        k = torch.cat([rotated.unsqueeze(1).expand(-1, self.heads, -1), k], dim=-1)
        v = F.pad(v, (0, self.size - m.value))
        out = self.attention(q.flatten(1), k.flatten(1), v.flatten(1), positions)
        return self.o_proj(out.unflatten(-1, (self.heads, -1))[..., : m.value].flatten(1))


def _latent_settings(config: Mapping[str, Any], moe: MoESettings, *, interleaved: bool) -> DecoderSettings:
    latent = LatentSettings(
        int(config.get("q_lora_rank") or 0),
        int(require(config, "kv_lora_rank")),
        int(require(config, "qk_rope_head_dim")),
        int(require(config, "qk_nope_head_dim")),
        int(require(config, "v_head_dim")),
        bias=bool(config.get("attention_bias", False)),
    )
    size, rope = latent.rotated + latent.plain, RopeSettings.from_config(config)
    if latent.value > size:
        raise ConfigError(f"v_head_dim {latent.value} is over the {size} channels of a key; that is not supported")
    stretch = 1.0
    if rope.kind != "default" and rope.options.get("mscale_all_dim"):
        stretch = yarn_magnitude(rope.option("factor"), rope.option("mscale_all_dim"))
    return DecoderSettings.from_config(
        config,
        head_size=size,
        kv_heads=int(require(config, "num_attention_heads")),
        rope=rope,
        interleaved=interleaved,
        scale=size**-0.5 * stretch * stretch,
        latent=latent,
        moe=moe,
    )


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    """DeepSeek-V2 and V2-Lite."""

    attention_type = LatentAttention
    weight_rules = (*expert_rules(), *shared_rules(), *LLAMA_RULES)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        groups: dict[str, int] = {}
        if config.get("topk_method", "greedy") == "group_limited_greedy":
            groups = {"groups": int(require(config, "n_group")), "top_groups": int(require(config, "topk_group"))}
        scale = float(config.get("routed_scaling_factor") or 1.0)
        return _latent_settings(config, _moe(config, _chosen(config, normalize=False, scale=scale, **groups)),
                                interleaved=True)  # fmt: skip

    @classmethod
    def rotary_size(cls, s: DecoderSettings) -> int:
        """See `DecoderModel`."""
        assert s.latent is not None
        return s.latent.rotated


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3 and R1; the layers that predict a second token are not used."""

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__(config, max_model_len=max_model_len, build=build)
        further = int(config.get("num_nextn_predict_layers") or 0)
        first = self.num_layers
        unused = tuple(WeightRule(f"model.layers.{i}.**", None) for i in range(first, first + further))
        self.weight_rules = (*unused, *self.weight_rules)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        choice = _chosen(
            config,
            scores="sigmoid",
            normalize=bool(config.get("norm_topk_prob", True)),
            scale=float(config.get("routed_scaling_factor") or 1.0),
            groups=int(config.get("n_group") or 1),
            top_groups=int(config.get("topk_group") or 1),
            group_top=2,
        )
        interleaved = bool(config.get("rope_interleave", True))
        return _latent_settings(config, _moe(config, choice, correction=True), interleaved=interleaved)
