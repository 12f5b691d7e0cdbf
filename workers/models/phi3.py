"""Phi-3, 3.5 and 4: Llama with q, k, v and gate, up in one tensor each, and LongRoPE in the long variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings, same_windows


class Phi3ForCausalLM(DecoderModel):
    """Phi-3; Phi-4 has the same architecture."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("attention_bias", False))
        return DecoderSettings.from_config(
            config,
            windows=same_windows(config),
            qkv_layout="fused",
            gate_up_fused=True,
            qkv_bias=bias,
            output_bias=bias,
        )
