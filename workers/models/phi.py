"""Phi 1, 1.5 and 2: layer norms, a part of each head rotated, attention beside the feed-forward layer, biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings


class PhiForCausalLM(LlamaForCausalLM):
    """Phi."""

    weight_rules = (
        *renamed(
            "model.layers.*",
            "model.layers.*",
            {
                "self_attn.dense": "self_attn.o_proj",
                "self_attn.q_layernorm": "self_attn.q_norm",
                "self_attn.k_layernorm": "self_attn.k_norm",
                "mlp.fc1": "mlp.up_proj",
                "mlp.fc2": "mlp.down_proj",
            },
        ),
        WeightRule("model.final_layernorm.*", "model.norm.*"),
        *LLAMA_RULES,
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        rope = RopeSettings.from_config(config)
        given = "partial_rotary_factor" in {**config, **(config.get("rope_parameters") or {})}
        return DecoderSettings.from_config(
            config,
            rope=rope if given else replace(rope, partial=0.5),
            block="parallel",
            norm="layer",
            eps=float(config.get("layer_norm_eps", 1e-5)),
            qk_norm="head" if config.get("qk_layernorm") else "",
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
            gated=False,
            activation=str(config.get("hidden_act", "gelu_new")),
        )
