"""Command R (Cohere) and Command R7B (Cohere2): layer norms without offset, attention beside the feed-forward layer,
neighbours rotated, scaled logits; the second generation has windows, and rotates nothing where it sees everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import require
from workers.models.llama import LlamaForCausalLM
from workers.models.settings import DecoderSettings, typed_windows


class CohereForCausalLM(LlamaForCausalLM):
    """Command R and R+."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        rope = RopeSettings.from_config(config, theta=500000.0)
        return _settings(config, rope=rope, qk_norm="each_head" if config.get("use_qk_norm") else "")


class Cohere2ForCausalLM(LlamaForCausalLM):
    """Command R7B and A."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        layers, pattern = int(require(config, "num_hidden_layers")), int(config.get("sliding_window_pattern") or 4)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        windows, rope = typed_windows(config, kinds), RopeSettings.from_config(config)
        return _settings(config, windows=windows, rope=rope, ropes=tuple(rope if w else None for w in windows))


def _settings(config: Mapping[str, Any], **changes: Any) -> DecoderSettings:
    bias = bool(config.get("attention_bias", False))
    return DecoderSettings.from_config(
        config,
        block="parallel",
        interleaved=True,
        norm="layer_without_bias",
        eps=float(config.get("layer_norm_eps", 1e-5)),
        tied=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=bias,
        output_bias=bias,
        logit_scale=float(config.get("logit_scale", 0.0625)),
        **changes,
    )
