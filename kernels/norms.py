"""Root mean square norm, alone and fused with the residual addition before it.

Shapes: T tokens, C channels.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
"""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in torch."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    # The rounding before the weight is llama's; without it bf16 differs from transformers in the last bit.
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the rows of `x` and scale them by `weight`.

    x [T, C], weight [C], the same floating dtype -> [T, C] in that dtype. The mean is taken in fp32; the normalized row
    is rounded to the dtype before the weight, as llama does.
    """
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, then normalize: returns (rms_norm(x + residual), x + residual).

    x and residual [T, C], weight [C], one floating dtype -> two new tensors [T, C]; the sum is rounded to the dtype
    before it is normalized, so the pair equals the two operations done one after the other.
    """
    return add_rms_norm_reference(x, residual, weight, eps)
