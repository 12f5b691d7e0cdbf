"""Baichuan and Baichuan 2: Llama with q, k and v in one tensor (W_pack).

The 13B models have ALiBi in the place of the rope; they are those that name `model_max_length` only. The head of the
second generation, which is known by its `z_loss_weight`, has rows of length one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.base import WeightRule, renamed, require
from workers.models.decoder import DecoderModel
from workers.models.llama import LLAMA_RULES
from workers.models.settings import DecoderSettings


class BaichuanForCausalLM(DecoderModel):
    """Both generations and both sizes."""

    weight_rules = (
        *renamed("model.layers.*", "model.layers.*", {"self_attn.W_pack": "self_attn.qkv_proj"}),
        WeightRule("model.future_mask", None),
        *LLAMA_RULES,
    )

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        return int(config.get("max_position_embeddings") or require(config, "model_max_length"))

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        alibi = not config.get("max_position_embeddings")
        return DecoderSettings.from_config(
            config,
            qkv_layout="fused",
            head_normalized="z_loss_weight" in config,
            **({"alibi": 1.0, "rope": None} if alibi else {}),
        )
