"""InternLM2: Llama with its own names, and q, k and v in one tensor, grouped by KV heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.base import WeightRule, renamed
from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings


class InternLM2ForCausalLM(DecoderModel):
    """InternLM2 and 2.5."""

    weight_rules = (
        *renamed(
            "model.layers.*",
            "model.layers.*",
            {
                "attention.wqkv": "self_attn.qkv_proj",
                "attention.wo": "self_attn.o_proj",
                "attention_norm": "input_layernorm",
                "ffn_norm": "post_attention_layernorm",
                "feed_forward.w2": "mlp.down_proj",
            },
        ),
        WeightRule("model.layers.*.feed_forward.w1.*", "model.layers.*.mlp.gate_up_proj.*", "gate"),
        WeightRule("model.layers.*.feed_forward.w3.*", "model.layers.*.mlp.gate_up_proj.*", "up"),
        WeightRule("model.tok_embeddings.*", "model.embed_tokens.*"),
        WeightRule("output.*", "lm_head.*"),
        WeightRule("model.layers.*.attention.rotary_emb.inv_freq", None),
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("bias", False))
        return DecoderSettings.from_config(config, qkv_layout="grouped", qkv_bias=bias, output_bias=bias)
