"""DBRX: layer norms without offset, clamped q, k and v, experts whose matrices lie below each other in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workers.api.errors import ConfigError
from workers.layers.build import Build
from workers.layers.moe import Choice, Experts
from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.feed_forward import MoEBlock
from workers.models.settings import DecoderSettings, MoESettings
from workers.quant.method import Part


class StackedExperts(Experts):
    """Experts of a checkpoint that has [E * I, C] each of gate, up and, transposed, down."""

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`: parts "3.gate", "3.up" and "3", each a slice of the stack."""
        whole, start = (self.count * self.inner, self.channels), self.group.rank * self.local
        found: dict[str, Part] = {}
        for key, part in super().parts(name).items():
            first = int(key.split(".")[0]) * self.inner + start
            found[key] = Part(whole, (slice(first, first + self.local), slice(0, self.channels)), part.target)
        return found

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        super().load(name, part, tensor.t() if name == "down" else tensor)


class DbrxForCausalLM(DecoderModel):
    """DBRX."""

    weight_rules = (
        *renamed(
            "transformer.blocks.*",
            "model.layers.*",
            {
                "norm_attn_norm.norm_1": "input_layernorm",
                "norm_attn_norm.norm_2": "post_attention_layernorm",
                "norm_attn_norm.attn.Wqkv": "self_attn.qkv_proj",
                "norm_attn_norm.attn.out_proj": "self_attn.o_proj",
                "ffn.router.layer": "mlp.gate",
            },
        ),
        WeightRule("transformer.blocks.*.ffn.experts.mlp.w1", "model.layers.*.mlp.experts.gate_up", "*.gate"),
        WeightRule("transformer.blocks.*.ffn.experts.mlp.v1", "model.layers.*.mlp.experts.gate_up", "*.up"),
        WeightRule("transformer.blocks.*.ffn.experts.mlp.w2", "model.layers.*.mlp.experts.down", "*"),
        WeightRule("transformer.wte.*", "model.embed_tokens.*"),
        WeightRule("transformer.norm_f.*", "model.norm.*"),
    )

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        return int(require(config, "max_seq_len"))

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        attention, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
        layers, norm = int(require(config, "n_layers")), ffn.get("moe_normalize_expert_weights", 1.0)
        if norm not in (None, 1, 1.0):
            raise ConfigError(f"DBRX with moe_normalize_expert_weights = {norm} is not supported, only 1")
        choice = Choice(int(require(ffn, "moe_num_experts")), int(require(ffn, "moe_top_k")), normalize=bool(norm))
        inner, theta = int(require(ffn, "ffn_hidden_size")), float(attention.get("rope_theta") or 1e4)
        hidden, heads = int(require(config, "d_model")), int(require(config, "n_heads"))
        usual = {**config, "max_position_embeddings": cls.context_length(config)}
        return DecoderSettings.from_config(
            usual,
            hidden=hidden,
            intermediate=inner,
            layers=layers,
            heads=heads,
            kv_heads=int(attention.get("kv_n_heads") or 1),
            head_size=hidden // heads,
            windows=(0,) * layers,
            rope=RopeSettings.from_config(usual, theta=theta),
            norm="layer_without_bias",
            eps=1e-5,
            qkv_layout="fused",
            qkv_clip=float(attention.get("clip_qkv") or 0.0),
            activation=str((ffn.get("ffn_act_fn") or {}).get("name", "silu")),
            moe=MoESettings(choice, inner, (True,) * layers),
        )

    @classmethod
    def make_mlp(cls, name: str, layer: int, s: DecoderSettings, *, build: Build) -> nn.Module:
        """See `DecoderModel`."""
        assert s.moe is not None
        return MoEBlock(name, s, s.moe, build=build, experts=StackedExperts)
