"""The llama family: Llama (also Code Llama, Yi, InternLM), Mistral (sliding window), Qwen2 (biases on q, k, v), Qwen3
(norms on q and k).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.models.base import WeightRule, require
from workers.models.decoder import DecoderModel
from workers.models.settings import DecoderSettings, same_windows, typed_windows

QKV_RULES = (
    WeightRule("model.layers.*.self_attn.q_proj.*", "model.layers.*.self_attn.qkv_proj.*", "q"),
    WeightRule("model.layers.*.self_attn.k_proj.*", "model.layers.*.self_attn.qkv_proj.*", "k"),
    WeightRule("model.layers.*.self_attn.v_proj.*", "model.layers.*.self_attn.qkv_proj.*", "v"),
    WeightRule("model.layers.*.self_attn.rotary_emb.inv_freq", None),  # checkpoints of 2023
)
LLAMA_RULES = (
    *QKV_RULES,
    WeightRule("model.layers.*.mlp.gate_proj.*", "model.layers.*.mlp.gate_up_proj.*", "gate"),
    WeightRule("model.layers.*.mlp.up_proj.*", "model.layers.*.mlp.gate_up_proj.*", "up"),
)


class LlamaForCausalLM(DecoderModel):
    """Llama, and the base of its relatives."""

    weight_rules: tuple[WeightRule, ...] = LLAMA_RULES

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """The settings of this member of the family."""
        bias = bool(config.get("attention_bias", False))
        return DecoderSettings.from_config(config, qkv_bias=bias, output_bias=bias)


class InternLMForCausalLM(LlamaForCausalLM):
    """InternLM: Llama with biases in attention, under the name `bias`."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("bias", True))
        return DecoderSettings.from_config(config, qkv_bias=bias, output_bias=bias)


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral: every layer sees a window, where the checkpoint has one."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        return DecoderSettings.from_config(config, windows=same_windows(config))


def qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The windows of Qwen's models: from layer `max_window_layers` on, if at all."""
    layers, first = int(require(config, "num_hidden_layers")), config.get("max_window_layers")
    if not config.get("use_sliding_window"):
        return (0,) * layers
    from_layer = layers if first is None else int(first)
    kinds = ["sliding_attention" if i >= from_layer else "full_attention" for i in range(layers)]
    return typed_windows(config, kinds)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 and 2.5: biases on q, k and v."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        return DecoderSettings.from_config(config, qkv_bias=True, windows=qwen_windows(config))


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3, dense: norms on the heads of q and k."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        bias = bool(config.get("attention_bias", False))
        return DecoderSettings.from_config(
            config, qkv_bias=bias, output_bias=bias, qk_norm="head", windows=qwen_windows(config)
        )
