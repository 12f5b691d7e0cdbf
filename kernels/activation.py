"""The gate of llama's feed-forward layer.

Shapes: T tokens, I intermediate channels.
Source: Shazeer, GLU Variants Improve Transformer, 2020 (SwiGLU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul` in torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where x [T, 2 * I] holds the gate first -> [T, I] in the dtype of x."""
    return silu_and_mul_reference(x)
