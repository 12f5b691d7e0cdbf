"""OLMo 2 and 3: norms behind attention and feed-forward, and over all heads of q and of k together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.layers.rotary import RopeSettings
from workers.models.base import require
from workers.models.llama import LlamaForCausalLM
from workers.models.settings import DecoderSettings, typed_windows


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        return _settings(config)


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """OLMo 3: three of four layers see a window, and only the others have a scaled rope."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        layers = int(require(config, "num_hidden_layers"))
        kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
        windows = typed_windows(config, kinds)
        rope = RopeSettings.from_config(config, layers="full_attention")
        # Where the layers' types have no parameters of their own, scaling is meant for those that see everything.
        inside = replace(rope, kind="default", options={})
        if "sliding_attention" in (config.get("rope_parameters") or {}):
            inside = RopeSettings.from_config(config, layers="sliding_attention")
        return _settings(config, windows=windows, rope=rope, ropes=tuple(inside if w else rope for w in windows))


def _settings(config: Mapping[str, Any], **changes: Any) -> DecoderSettings:
    bias = bool(config.get("attention_bias", False))
    return DecoderSettings.from_config(
        config,
        block="post_norm",
        qk_norm="width",
        eps=float(config.get("rms_norm_eps", 1e-5)),
        qkv_bias=bias,
        output_bias=bias,
        **changes,
    )
