"""Root mean square norm. Shapes: T tokens, C channels."""

from __future__ import annotations

import torch
from torch import nn

from kernels.norms import add_rms_norm, rms_norm
from workers.layers.build import Build


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis with a learned scale; the whole weight on every rank."""

    def __init__(self, channels: int, eps: float, *, build: Build) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(channels, dtype=build.dtype, device=build.device)
        self.weight = nn.Parameter(ones, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> the same shape."""
        if x.dim() == 2:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), each [T, C]."""
        return add_rms_norm(x, residual, self.weight, self.eps)
