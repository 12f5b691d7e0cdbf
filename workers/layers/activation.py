"""The gated activation of a feed-forward layer. Shapes: T tokens, I intermediate channels."""

from __future__ import annotations

import torch
from torch import nn

from kernels.activation import silu_and_mul


class SiluAndMul(nn.Module):
    """silu(gate) * up of a merged gate-up projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 2 * I], the gate first -> [T, I]."""
        return silu_and_mul(x)
