"""Feed-forward layers: with a gate, without, and mixtures of experts; and where checkpoints keep experts' tensors.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from workers.layers.activation import Activation, GateAndMul
from workers.layers.build import Build
from workers.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from workers.layers.moe import Experts, Router
from workers.models.base import WeightRule
from workers.models.settings import DecoderSettings, MoESettings


class GatedMLP(nn.Module):
    """The feed-forward layer with a gate."""

    ends_with: ClassVar[str] = "down_proj"

    def __init__(
        self, name: str, s: DecoderSettings, *, build: Build, intermediate: int = 0, bias: bool | None = None
    ) -> None:
        super().__init__()
        size, bias = intermediate or s.intermediate, s.mlp_bias if bias is None else bias
        self.gate_up_proj = MergedColumnParallelLinear(
            f"{name}.gate_up_proj", s.hidden, {"gate": size, "up": size}, bias=bias, build=build, fused=s.gate_up_fused
        )
        self.down_proj = RowParallelLinear(f"{name}.down_proj", size, s.hidden, bias=bias, build=build)
        self.activation = GateAndMul(s.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class PlainMLP(nn.Module):
    """The feed-forward layer without a gate."""

    ends_with: ClassVar[str] = "down_proj"

    def __init__(self, name: str, s: DecoderSettings, *, build: Build) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", s.hidden, s.intermediate, bias=s.mlp_bias, build=build)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", s.intermediate, s.hidden, bias=s.mlp_bias, build=build)
        self.activation = Activation(s.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(self.activation(self.up_proj(x)))


class MoEBlock(nn.Module):
    """Router, experts, and the shared experts where there are any."""

    def __init__(
        self,
        name: str,
        s: DecoderSettings,
        m: MoESettings,
        *,
        build: Build,
        experts: type[Experts] = Experts,
        bias: bool = False,
        gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """`experts` knows the checkpoint's tensors; `bias`: router and experts have one."""
        super().__init__()
        self.gate = Router(s.hidden, m.choice, build=build, bias=bias, correction=m.correction)
        self.experts = experts(
            m.choice.experts, s.hidden, m.intermediate, m.choice.top_k, build=build, bias=bias,
            gate=gate or GateAndMul(s.activation),
        )  # fmt: skip
        self.shared_expert = self.shared_expert_gate = None
        if m.shared:
            self.shared_expert = GatedMLP(f"{name}.shared_expert", s, build=build, intermediate=m.shared, bias=False)
        if m.shared_gate:
            self.shared_expert_gate = _Scalar(s.hidden, build=build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C]."""
        out = self.experts(x, *self.gate(x))
        if self.shared_expert is None:
            return out
        shared = self.shared_expert(x)
        return out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)


class _Scalar(nn.Module):
    """One number a token, on every rank."""

    def __init__(self, channels: int, *, build: Build) -> None:
        super().__init__()
        zeros = torch.zeros(1, channels, dtype=build.dtype, device=build.device)
        self.weight = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, 1]."""
        return F.linear(x, self.weight)


def make_feed_forward(name: str, layer: int, s: DecoderSettings, *, build: Build) -> nn.Module:
    """The feed-forward part of one layer, as the settings say."""
    if s.moe is not None and s.moe.layers[layer]:
        return MoEBlock(name, s, s.moe, build=build)
    return GatedMLP(name, s, build=build) if s.gated else PlainMLP(name, s, build=build)


def expert_rules(
    module: str = "mlp", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[WeightRule, ...]:
    """Rules for experts that have a tensor for each matrix, under `module` of a layer."""
    source, target = f"model.layers.*.{module}.experts.*", "model.layers.*.mlp.experts"
    return (
        WeightRule(f"{source}.{gate}.weight", f"{target}.gate_up", "*.gate"),
        WeightRule(f"{source}.{up}.weight", f"{target}.gate_up", "*.up"),
        WeightRule(f"{source}.{down}.weight", f"{target}.down", "*"),
    )


def shared_rules(name: str = "shared_experts") -> tuple[WeightRule, ...]:
    """Rules for the shared experts that the checkpoint calls `name`."""
    source, target = f"model.layers.*.mlp.{name}", "model.layers.*.mlp.shared_expert"
    return (
        WeightRule(f"{source}.gate_proj.weight", f"{target}.gate_up_proj.weight", "gate"),
        WeightRule(f"{source}.up_proj.weight", f"{target}.gate_up_proj.weight", "up"),
        WeightRule(f"{source}.down_proj.weight", f"{target}.down_proj.weight"),
    )
