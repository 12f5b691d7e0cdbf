"""Mixtral: Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.layers.moe import Choice
from workers.models.base import WeightRule, require
from workers.models.feed_forward import expert_rules
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings, MoESettings, same_windows


class MixtralForCausalLM(LlamaForCausalLM):
    """Mixtral 8x7B, 8x22B."""

    weight_rules = (
        *expert_rules("block_sparse_moe", gate="w1", up="w3", down="w2"),
        WeightRule("model.layers.*.block_sparse_moe.gate.weight", "model.layers.*.mlp.gate.weight"),
        *LLAMA_RULES,
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        choice = Choice(int(require(config, "num_local_experts")), int(require(config, "num_experts_per_tok")))
        layers = int(require(config, "num_hidden_layers"))
        moe = MoESettings(choice, int(require(config, "intermediate_size")), (True,) * layers)
        return DecoderSettings.from_config(config, windows=same_windows(config), moe=moe)
