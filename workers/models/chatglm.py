"""ChatGLM2, ChatGLM3 and GLM-4 as published with code in the checkpoint: q, k, v and gate, up in one tensor each, KV
heads in groups, half of each head rotated by neighbours. (GLM-4 in transformers' own layout is in `glm.py`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.api.errors import ConfigError
from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings


class ChatGLMModel(DecoderModel):
    """ChatGLM, from the second on."""

    weight_rules = (
        *renamed(
            "transformer.encoder.layers.*",
            "model.layers.*",
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
                "self_attention.query_key_value": "self_attn.qkv_proj",
                "self_attention.dense": "self_attn.o_proj",
                "mlp.dense_h_to_4h": "mlp.gate_up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        WeightRule("transformer.embedding.word_embeddings.*", "model.embed_tokens.*"),
        WeightRule("transformer.encoder.final_layernorm.*", "model.norm.*"),
        WeightRule("transformer.output_layer.*", "lm_head.*"),
        WeightRule("transformer.rotary_pos_emb.inv_freq", None),
    )

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        return int(require(config, "seq_length"))

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        if config.get("apply_residual_connection_post_layernorm"):
            raise ConfigError("ChatGLM with apply_residual_connection_post_layernorm is not supported")
        if not config.get("post_layer_norm", True) or not config.get("rmsnorm", True):
            raise ConfigError("ChatGLM without post_layer_norm or without rmsnorm is not supported")
        heads = int(require(config, "num_attention_heads"))
        grouped, bias = bool(config.get("multi_query_attention")), bool(config.get("add_bias_linear", False))
        theta = 10000.0 * float(config.get("rope_ratio") or 1.0)
        return DecoderSettings.from_config(
            config,
            vocab_size=int(config.get("padded_vocab_size") or require(config, "vocab_size")),
            intermediate=int(require(config, "ffn_hidden_size")),
            layers=int(require(config, "num_layers")),
            windows=(0,) * int(require(config, "num_layers")),
            kv_heads=int(require(config, "multi_query_group_num")) if grouped else heads,
            head_size=int(require(config, "kv_channels")),
            eps=float(config.get("layernorm_epsilon", 1e-5)),
            rope=RopeSettings(theta, cls.context_length(config), partial=0.5),
            interleaved=True,
            qkv_layout="fused",
            gate_up_fused=True,
            qkv_bias=bias or bool(config.get("add_qkv_bias", False)),
            output_bias=bias,
            mlp_bias=bias,
        )
