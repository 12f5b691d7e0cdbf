"""Granite: Llama with factors on the embedding, the scores, what layers add, and the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.llama import LlamaForCausalLM
from workers.models.settings import DecoderSettings


class GraniteForCausalLM(LlamaForCausalLM):
    """Granite 3, dense."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("attention_bias", False))
        return DecoderSettings.from_config(
            config,
            qkv_bias=bias,
            output_bias=bias,
            embedding_scale=float(config.get("embedding_multiplier", 1.0)),
            residual_scale=float(config.get("residual_multiplier", 1.0)),
            scale=float(config.get("attention_multiplier", 1.0)),
            logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        )
