"""`LinearMethod`: how a linear layer holds its weights (create, load, apply), and the plain one.

A layer says which slice of the whole matrix it holds (`LinearShape`); the method says which parameters that makes and
which slice of which checkpoint tensor fills them (`Part`). The loader knows nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from kernels.invariant_linear import invariant_linear
from kernels.linear import linear
from workers.api.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a checkpoint tensor: of `full` entries this rank holds [start, start + size), put at `offset`."""

    full: int
    start: int
    size: int
    offset: int = 0

    def scaled(self, pack: int, what: str) -> Span:
        """The span in units of `pack` entries. Raises ConfigError where a shard would cut through one."""
        if any(value % pack for value in (self.full, self.start, self.size, self.offset)):
            raise ConfigError(
                f"{what}: a shard of {self.size} at {self.start} of {self.full} does not fall on multiples of {pack}; "
                f"use fewer ranks"
            )
        return Span(self.full // pack, self.start // pack, self.size // pack, self.offset // pack)

    @property
    def source(self) -> slice:
        """Of the checkpoint tensor."""
        return slice(self.start, self.start + self.size)

    @property
    def target(self) -> slice:
        """Of the parameter."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor, `shape` as a whole, and where its `source` slices go in a parameter (`target`)."""

    shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: tuple[slice, ...]

    @staticmethod
    def of(*axes: Span) -> Part:
        """From one span an axis."""
        return Part(
            tuple(a.full for a in axes),
            tuple(a.source for a in axes),
            tuple(a.target for a in axes),
        )

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Part:
        """All of a tensor, on every rank."""
        return Part.of(*(Span(n, 0, n) for n in shape))


@dataclass(frozen=True, slots=True)
class LinearShape:
    """What one rank holds of a linear layer. Merged layers (QKV, gate-up) have several named outputs, others ""."""

    inputs: Span
    outputs: Mapping[str, Span]

    @property
    def num_outputs(self) -> int:
        """Output channels on this rank."""
        return sum(span.size for span in self.outputs.values())


class LinearMethod(Protocol):
    """How a linear layer holds its weights. One object may serve many layers: the state is the layer's parameters."""

    def create_weights(
        self, layer: nn.Module, shape: LinearShape, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register the layer's parameters. Raises ConfigError where a shard cuts through the format's granularity."""

    def parts(self, layer: nn.Module, shape: LinearShape, name: str) -> Mapping[str, Part]:
        """Which checkpoint tensors fill parameter `name`, by the name of the output."""

    def load(self, parameter: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
        """Put `tensor`, the part's source slice, into the parameter."""

    def finish(self, layer: nn.Module) -> None:
        """Called once after all of the layer's tensors were loaded: repack here."""

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] -> [T, outputs], this rank's share, bias included."""


class UnquantizedLinear:
    """weight [outputs, inputs] and bias [outputs] in the model's dtype."""

    def create_weights(
        self, layer: nn.Module, shape: LinearShape, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register `weight` and, with a bias, `bias`."""
        weight = torch.empty(shape.num_outputs, shape.inputs.size, dtype=dtype, device=device)
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        offset = torch.zeros(shape.num_outputs, dtype=dtype, device=device) if bias else None
        layer.register_parameter("bias", None if offset is None else nn.Parameter(offset, requires_grad=False))

    def parts(self, layer: nn.Module, shape: LinearShape, name: str) -> Mapping[str, Part]:
        """One tensor for each output."""
        if name == "bias":
            return {key: Part.of(span) for key, span in shape.outputs.items()}
        return {key: Part.of(span, shape.inputs) for key, span in shape.outputs.items()}

    def load(self, parameter: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
        """Copy, converted to the parameter's dtype."""
        parameter[part.target].copy_(tensor)

    def finish(self, layer: nn.Module) -> None:
        """Nothing to repack."""

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Matrix product and bias."""
        return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


class BatchInvariantLinear(UnquantizedLinear):
    """The plain method, by a product in which a token's result does not depend on the other tokens."""

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Matrix product and bias."""
        return invariant_linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
