"""GPT-NeoX and Pythia: q, k and v of a head beside each other in one tensor, a quarter of each head rotated, attention
beside the feed-forward layer with a norm for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.api.errors import ConfigError
from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings


class GPTNeoXForCausalLM(DecoderModel):
    """GPT-NeoX with a parallel residual, as all published ones have it."""

    weight_rules = (
        *renamed(
            "gpt_neox.layers.*",
            "model.layers.*",
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
                "attention.query_key_value": "self_attn.qkv_proj",
                "attention.dense": "self_attn.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        WeightRule("gpt_neox.embed_in.*", "model.embed_tokens.*"),
        WeightRule("gpt_neox.final_layer_norm.*", "model.norm.*"),
        WeightRule("embed_out.*", "lm_head.*"),
        WeightRule("gpt_neox.layers.*.attention.rotary_emb.inv_freq", None),
        WeightRule("gpt_neox.layers.*.attention.bias", None),
        WeightRule("gpt_neox.layers.*.attention.masked_bias", None),
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        if not config.get("use_parallel_residual", True):
            raise ConfigError("GPT-NeoX without use_parallel_residual is not supported")
        given = "partial_rotary_factor" in (config.get("rope_parameters") or {})
        rope = RopeSettings.from_config(config, theta=float(config.get("rotary_emb_base") or 1e4))
        bias = bool(config.get("attention_bias", True))
        return DecoderSettings.from_config(
            config,
            rope=rope if given else replace(rope, partial=float(config.get("rotary_pct") or 0.25)),
            block="parallel_norms",
            kv_heads=int(require(config, "num_attention_heads")),
            norm="layer",
            eps=float(config.get("layer_norm_eps", 1e-5)),
            qkv_layout="grouped",
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=True,
            gated=False,
            activation=str(config.get("hidden_act", "gelu")),
        )
