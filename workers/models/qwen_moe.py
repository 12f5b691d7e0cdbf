"""Qwen1.5-MoE and Qwen2-MoE (experts and a shared expert behind a gate), Qwen3-MoE (experts, norms on q and k)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.layers.moe import Choice
from workers.models.base import require
from workers.models.feed_forward import expert_rules, shared_rules
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings, MoESettings, same_windows, typed_windows


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B."""

    weight_rules = (*expert_rules(), *shared_rules("shared_expert"), *LLAMA_RULES)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        moe = _moe(config, shared=int(require(config, "shared_expert_intermediate_size")))
        layers, below = int(require(config, "num_hidden_layers")), int(config.get("max_window_layers") or 0)
        windows = (0,) * layers
        if config.get("use_sliding_window"):
            kinds = ["full_attention" if i % 2 or i >= below else "sliding_attention" for i in range(layers)]
            windows = typed_windows(config, kinds)
        bias = bool(config.get("qkv_bias", True))
        return DecoderSettings.from_config(config, qkv_bias=bias, windows=windows, moe=moe)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """Qwen3-30B-A3B, Qwen3-235B-A22B."""

    weight_rules = (*expert_rules(), *LLAMA_RULES)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias, layers = bool(config.get("attention_bias", False)), int(require(config, "num_hidden_layers"))
        return DecoderSettings.from_config(
            config,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="head",
            windows=same_windows(config) if config.get("use_sliding_window") else (0,) * layers,
            moe=_moe(config),
        )


def _moe(config: Mapping[str, Any], shared: int = 0) -> MoESettings:
    dense, step = set(config.get("mlp_only_layers") or ()), int(config.get("decoder_sparse_step") or 1)
    experts = int(config.get("num_experts") or require(config, "num_local_experts"))
    normalize = bool(config.get("norm_topk_prob", False))
    return MoESettings(
        Choice(experts, int(require(config, "num_experts_per_tok")), normalize=normalize),
        int(require(config, "moe_intermediate_size")),
        tuple(i not in dense and (i + 1) % step == 0 for i in range(int(require(config, "num_hidden_layers")))),
        shared=shared,
        shared_gate=shared > 0,
    )
