"""GPT-OSS in 16 bits: attention sinks, alternating windows, YaRN, experts with biases and a clamped gate.

The published checkpoints hold the experts in MXFP4, which is not read; one that was converted to bf16 is.

Shapes: M rows, E experts, C channels, I inner channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from workers.layers.build import Build
from workers.layers.moe import Choice, Experts
from workers.layers.rotary import RopeSettings
from workers.models.base import WeightRule, renamed, require
from workers.models.feed_forward import MoEBlock
from workers.models.llama import LLAMA_RULES, LlamaForCausalLM
from workers.models.settings import DecoderSettings, MoESettings, typed_windows
from workers.quant.method import Part


def clamped_gate(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """x [M, 2 * I], the gate first -> [M, I]: (up + 1) * gate * sigmoid(alpha * gate), both clamped."""
    gate, up = x.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


class InterleavedExperts(Experts):
    """Experts of a checkpoint with one tensor for all, inputs first, gate and up in turn: [E, C, 2 * I], [E, I, C]."""

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        e, c, first = slice(0, self.count), slice(0, self.channels), self.group.rank * self.local
        inner, both = slice(first, first + self.local), slice(2 * first, 2 * (first + self.local))
        shapes = {
            "gate_up": ((self.count, self.channels, 2 * self.inner), (e, c, both)),
            "gate_up_bias": ((self.count, 2 * self.inner), (e, both)),
            "down": ((self.count, self.inner, self.channels), (e, inner, c)),
            # One rank adds it: the sum over the ranks would hold it many times.
            "down_bias": ((self.count, self.channels), (e if self.group.rank == 0 else slice(0, 0), c)),
        }
        shape, source = shapes[name]
        return {"": Part(shape, source, (e,))}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        if name.startswith("gate_up"):
            tensor = torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)
        self.get_parameter(name).copy_(tensor if name.endswith("bias") else tensor.transpose(1, 2))


class GptOssForCausalLM(LlamaForCausalLM):
    """GPT-OSS 20B and 120B."""

    weight_rules = (
        WeightRule("model.layers.*.self_attn.sinks", "model.layers.*.self_attn.sinks.sinks"),
        *renamed("model.layers.*", "model.layers.*", {"mlp.router": "mlp.gate"}),
        *(
            WeightRule(f"model.layers.*.mlp.experts.{theirs}", f"model.layers.*.mlp.experts.{ours}")
            for theirs, ours in {
                "gate_up_proj": "gate_up",
                "gate_up_proj_bias": "gate_up_bias",
                "down_proj": "down",
                "down_proj_bias": "down_bias",
            }.items()
        ),
        *LLAMA_RULES,
    )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """See `DecoderModel`."""
        layers, bias = int(require(config, "num_hidden_layers")), bool(config.get("attention_bias", True))
        choice = Choice(int(require(config, "num_local_experts")), int(require(config, "num_experts_per_tok")))
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        return DecoderSettings.from_config(
            config,
            rope=RopeSettings.from_config(config, theta=150000.0),
            windows=typed_windows(config, kinds),
            sinks=True,
            qkv_bias=bias,
            output_bias=bias,
            moe=MoESettings(choice, int(require(config, "intermediate_size")), (True,) * layers),
        )

    @classmethod
    def make_mlp(cls, name: str, layer: int, s: DecoderSettings, *, build: Build) -> nn.Module:
        """See `DecoderModel`."""
        assert s.moe is not None
        gate = partial(clamped_gate, alpha=1.702, limit=7.0)
        return MoEBlock(name, s, s.moe, build=build, experts=InterleavedExperts, bias=True, gate=gate)
