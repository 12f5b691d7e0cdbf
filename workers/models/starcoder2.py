"""StarCoder2: layer norms, biases, a feed-forward layer without gate, a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.base import renamed
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings, same_windows


class Starcoder2ForCausalLM(LlamaForCausalLM):
    """StarCoder2."""

    weight_rules = (
        *renamed("model.layers.*", "model.layers.*", {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}),
        *LLAMA_RULES,
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("use_bias", True))
        return DecoderSettings.from_config(
            config,
            norm="layer",
            eps=float(config.get("norm_epsilon", 1e-5)),
            windows=same_windows(config),
            tied=bool(config.get("tie_word_embeddings", True)),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            gated=False,
            activation=str(config.get("hidden_act", "gelu_pytorch_tanh")),
        )
