"""GLM-4 in transformers' layout: half of each head rotated by neighbours, gate and up in one tensor; the models of 2025
(Glm4) have norms behind attention and feed-forward, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed
from workers.models.llama import QKV_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings


class GlmForCausalLM(LlamaForCausalLM):
    """GLM-4-9B and its relatives."""

    weight_rules: tuple[WeightRule, ...] = QKV_RULES

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        rope = RopeSettings.from_config(config)
        given = "partial_rotary_factor" in {**config, **(config.get("rope_parameters") or {})}
        return DecoderSettings.from_config(
            config,
            rope=rope if given else replace(rope, partial=0.5),
            interleaved=True,
            gate_up_fused=True,
            qkv_bias=bool(config.get("attention_bias", True)),
        )


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM-4-0414."""

    weight_rules = (
        *renamed(
            "model.layers.*",
            "model.layers.*",
            {
                "post_self_attn_layernorm": "post_attention_layernorm",
                "post_attention_layernorm": "pre_feedforward_layernorm",
                "post_mlp_layernorm": "post_feedforward_layernorm",
            },
        ),
        *QKV_RULES,
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        return replace(super().read_settings(config), block="sandwich")
