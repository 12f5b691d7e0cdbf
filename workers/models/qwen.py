"""The first Qwen: q, k and v in one tensor, LogN attention and its own NTK scaling for contexts beyond the trained one.

The scaling goes by the context that the server was started with, not by each sequence's length: see `layers.rotary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings


class QWenLMHeadModel(DecoderModel):
    """Qwen 1.8B to 72B of 2023; from Qwen1.5 on it is Qwen2."""

    weight_rules = (
        *renamed(
            "transformer.h.*",
            "model.layers.*",
            {
                "ln_1": "input_layernorm",
                "ln_2": "post_attention_layernorm",
                "attn.c_attn": "self_attn.qkv_proj",
                "attn.c_proj": "self_attn.o_proj",
                "mlp.c_proj": "mlp.down_proj",
            },
        ),
        WeightRule("transformer.h.*.mlp.w1.*", "model.layers.*.mlp.gate_up_proj.*", "up"),
        WeightRule("transformer.h.*.mlp.w2.*", "model.layers.*.mlp.gate_up_proj.*", "gate"),
        WeightRule("transformer.wte.*", "model.embed_tokens.*"),
        WeightRule("transformer.ln_f.*", "model.norm.*"),
        WeightRule("transformer.rotary_emb.inv_freq", None),
    )

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """What it was trained with; more can be asked for."""
        return int(require(config, "seq_length"))

    @classmethod
    def longest_context(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        trained = cls.context_length(config)
        return max(trained, int(config.get("max_position_embeddings") or 0)) if _scales(config) else trained

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias, trained = not config.get("no_bias", True), cls.context_length(config)
        theta, partial = float(config.get("rotary_emb_base") or 1e4), float(config.get("rotary_pct") or 1.0)
        kind = "qwen_ntk" if config.get("use_dynamic_ntk") else "default"
        return DecoderSettings.from_config(
            config,
            intermediate=int(require(config, "intermediate_size")) // 2,
            head_size=int(config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"]),
            eps=float(config.get("layer_norm_epsilon", 1e-6)),
            rope=RopeSettings(theta, trained, kind, partial=partial),
            activation="silu",
            qkv_layout="fused",
            qkv_bias=True,
            output_bias=bias,
            mlp_bias=bias,
            logn=trained if config.get("use_logn_attn") else 0,
        )


def _scales(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_dynamic_ntk") or config.get("use_logn_attn"))
