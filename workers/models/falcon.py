"""Falcon: 7B (one KV head, attention beside the feed-forward layer), 40B and 180B ("new decoder architecture": KV heads
in groups, a norm for each part), RW (ALiBi, one part after the other).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.api.errors import ConfigError
from workers.layers.build import Build
from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.settings import BlockKind, DecoderSettings


def _kind(config: Mapping[str, Any]) -> BlockKind:
    new, parallel = bool(config.get("new_decoder_architecture")), bool(config.get("parallel_attn", True))
    if not new:
        return "parallel" if parallel else "sequential"
    if not parallel:
        raise ConfigError("Falcon's new decoder architecture without parallel_attn is not supported")
    norms = config.get("num_ln_in_parallel_attn")
    return "parallel_norms" if norms is None or int(norms) == 2 else "parallel"


class FalconForCausalLM(DecoderModel):
    """Falcon; the block is chosen by the config."""

    weight_rules = (
        *renamed(
            "transformer.h.*",
            "model.layers.*",
            {
                "ln_attn": "input_layernorm",
                "ln_mlp": "post_attention_layernorm",
                "self_attention.query_key_value": "self_attn.qkv_proj",
                "self_attention.dense": "self_attn.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        WeightRule("transformer.word_embeddings.*", "model.embed_tokens.*"),
        WeightRule("transformer.ln_f.*", "model.norm.*"),
    )
    _norm_rules = renamed(
        "transformer.h.*",
        "model.layers.*",
        {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"},
    )

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__(config, max_model_len=max_model_len, build=build)
        if self.settings.block != "parallel_norms":
            self.weight_rules = (*self._norm_rules, *self.weight_rules)

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """2048 where the checkpoint does not say."""
        return int(config.get("max_position_embeddings") or 2048)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        hidden, heads = int(require(config, "hidden_size")), int(require(config, "num_attention_heads"))
        new, multi_query = bool(config.get("new_decoder_architecture")), bool(config.get("multi_query", True))
        kv_heads = int(config.get("num_kv_heads") or heads) if new or not multi_query else 1
        alibi, bias = bool(config.get("alibi")), bool(config.get("bias", False))
        full = {**config, "max_position_embeddings": cls.context_length(config)}
        return DecoderSettings.from_config(
            full,
            kv_heads=kv_heads,
            intermediate=int(config.get("ffn_hidden_size") or 4 * hidden),
            block=_kind(config),
            norm="layer",
            eps=float(config.get("layer_norm_epsilon", 1e-5)),
            tied=bool(config.get("tie_word_embeddings", True)),
            qkv_layout="grouped",
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            gated=False,
            activation=str(config.get("activation") or "gelu"),
            # Scores are scaled after the slopes were added.
            **({"alibi": (hidden // heads) ** -0.5, "rope": None} if alibi else {}),
        )
