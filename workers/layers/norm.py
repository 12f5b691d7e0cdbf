"""Norms: root mean square and its variants, layer norm. Shapes: T tokens, C channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from kernels.norms import add_rms_norm, rms_norm
from workers.layers.build import Build, divide
from workers.parallel.group import Group
from workers.quant.method import Part, Span


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis with a learned scale; the whole weight on every rank."""

    def __init__(self, channels: int, eps: float, *, build: Build) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(channels, dtype=build.dtype, device=build.device)
        self.weight = nn.Parameter(ones, requires_grad=False)
        self._group: Group | None = None

    def sum_first(self, group: Group) -> None:
        """From now on `add` gets each rank's part of x, and sums them over `group` before anything else."""
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> the same shape."""
        if x.dim() == 2:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), each [T, C]."""
        if self._group is not None:
            return self._group.add_rms_norm(x, residual, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """A root mean square norm whose checkpoint holds the weight less one (Gemma).

    The sum is kept in fp32: one of 16 bits would not hold it.
    """

    def __init__(self, channels: int, eps: float, *, build: Build) -> None:
        super().__init__(channels, eps, build=build)
        self.weight = nn.Parameter(self.weight.float(), requires_grad=False)

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        return {"": Part.whole(tuple(self.weight.shape))}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.weight.copy_(tensor.float() + 1.0)

    def finish(self) -> None:
        """See `Loadable`."""


class ShardedRMSNorm(nn.Module):
    """A root mean square norm over channels that are cut over the ranks (the heads of q and k in OLMo2)."""

    def __init__(self, channels: int, eps: float, *, build: Build, copies: int = 1) -> None:
        """`copies`: how many ranks hold each channel, as KV heads where there are fewer of them than ranks."""
        super().__init__()
        self.eps, self.channels, self.copies = eps, channels, copies
        self.group = build.groups.tp
        shards = self.group.size // copies
        size = divide(channels, shards, "channels of a norm")
        self._span = Span(channels, self.group.rank // copies * size, size)
        self.weight = nn.Parameter(torch.ones(size, dtype=build.dtype, device=build.device), requires_grad=False)

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        return {"": Part.of(self._span)}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.weight.copy_(tensor)

    def finish(self) -> None:
        """See `Loadable`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C of this rank] -> the same shape."""
        if self.group.size == 1:
            return rms_norm(x, self.weight, self.eps)
        x32 = x.float()
        total = self.group.all_reduce(x32.pow(2).sum(-1, keepdim=True)) / (self.channels * self.copies)
        return (x32 * torch.rsqrt(total + self.eps)).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """Layer norm with a learned scale and perhaps an offset, whole on every rank."""

    def __init__(self, channels: int, eps: float, *, build: Build, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(channels, dtype=build.dtype, device=build.device)
        self.weight = nn.Parameter(ones, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros_like(ones), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), each [T, C]."""
        total = x + residual
        return self(total), total


class HeadNorm(nn.Module):
    """Layer norm without offset over each head's channels, with a weight a head (Cohere); this rank's heads."""

    def __init__(self, heads: int, local: int, first: int, size: int, eps: float, *, build: Build) -> None:
        super().__init__()
        self.eps, self._spans = eps, (Span(heads, first, local), Span(size, 0, size))
        self.weight = nn.Parameter(torch.ones(local, size, dtype=build.dtype, device=build.device), requires_grad=False)

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        return {"": Part.of(*self._spans)}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.weight.copy_(tensor)

    def finish(self) -> None:
        """See `Loadable`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D] -> the same shape."""
        return F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps).to(x.dtype) * self.weight
