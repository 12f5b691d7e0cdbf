"""Gemma (norms with an offset, scaled embedding), Gemma 2 (soft caps, alternating windows, norms on both sides) and the
text part of Gemma 3 (norms on q and k, another rope where there is a window).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import require
from workers.models.llama import LlamaForCausalLM
from workers.models.settings import DecoderSettings, typed_windows


def _settings(config: Mapping[str, Any], **changes: Any) -> DecoderSettings:
    bias = bool(config.get("attention_bias", False))
    activation = str(config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh")
    return DecoderSettings.from_config(
        config,
        norm="offset_rms",
        # The first checkpoints say "gelu" and mean the approximation.
        activation="gelu_pytorch_tanh" if activation == "gelu" else activation,
        embedding_scale=float(require(config, "hidden_size")) ** 0.5,
        tied=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=bias,
        output_bias=bias,
        **changes,
    )


class GemmaForCausalLM(LlamaForCausalLM):
    """Gemma."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        return _settings(config)


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2: every other layer sees a window."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        layers = int(require(config, "num_hidden_layers"))
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        return _settings(
            config,
            block="sandwich",
            windows=typed_windows(config, kinds),
            scale=float(require(config, "query_pre_attn_scalar")) ** -0.5,
            soft_cap=float(config.get("attn_logit_softcapping") or 0.0),
            logit_soft_cap=float(config.get("final_logit_softcapping") or 0.0),
        )


class Gemma3ForCausalLM(LlamaForCausalLM):
    """Gemma 3, text only: one layer in `sliding_window_pattern` sees everything."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        layers, pattern = int(require(config, "num_hidden_layers")), int(config.get("sliding_window_pattern") or 6)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        windows = typed_windows(config, kinds)
        everywhere, inside = _ropes(config)
        return _settings(
            config,
            block="sandwich",
            windows=windows,
            rope=everywhere,
            ropes=tuple(inside if window else everywhere for window in windows),
            qk_norm="head",
            scale=float(require(config, "query_pre_attn_scalar")) ** -0.5,
            soft_cap=float(config.get("attn_logit_softcapping") or 0.0),
            logit_soft_cap=float(config.get("final_logit_softcapping") or 0.0),
        )


def _ropes(config: Mapping[str, Any]) -> tuple[RopeSettings, RopeSettings]:
    """Of layers that see everything, and of those with a window."""
    if "full_attention" in (config.get("rope_parameters") or {}):
        everywhere = RopeSettings.from_config(config, layers="full_attention")
        return everywhere, RopeSettings.from_config(config, layers="sliding_attention")
    everywhere = RopeSettings.from_config(config, theta=1e6)
    return everywhere, RopeSettings(float(config.get("rope_local_base_freq") or 1e4), everywhere.trained)
