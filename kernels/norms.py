"""Root mean square norm, alone and fused with the residual addition before it.

Shapes: T tokens, C channels.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.backend import begin, constexpr, early_start, next_power_of_two, tensor, tl, triton_jit, use_triton


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in torch."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype != x.dtype:
        return (normed * weight).to(x.dtype)
    # The rounding before the weight is llama's; without it bf16 differs from transformers in the last bit.
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


@triton_jit
def scaled_norm(x: tensor, weight: tensor, eps: tensor, CHANNELS: constexpr) -> tensor:
    """A whole row, zeros behind its channels, normalized and scaled."""
    x32 = x.to(tl.float32)
    normed = x32 * tl.rsqrt(tl.sum(x32 * x32, axis=0) / CHANNELS + eps)
    if weight.dtype == x.dtype:
        normed = normed.to(x.dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(x.dtype)


@triton_jit
def _norm_kernel(
    x_ptr: tensor,
    residual_ptr: tensor,
    weight_ptr: tensor,
    out_ptr: tensor,
    total_ptr: tensor,
    x_stride: tensor,
    residual_stride: tensor,
    eps: tensor,
    CHANNELS: constexpr,
    BLOCK_C: constexpr,
    ADD: constexpr,
    EARLY: constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0)
    begin(EARLY)
    x = tl.load(x_ptr + row * x_stride + channel, mask=real, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + channel, mask=real, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * CHANNELS + channel, x, mask=real)
    tl.store(out_ptr + row * CHANNELS + channel, scaled_norm(x, weight, eps, CHANNELS), mask=real)


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, add: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, channels = x.shape
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if add else out
    if tokens:
        block = next_power_of_two(channels)
        warps = min(max(block // 512, 1), 16)
        _norm_kernel[(tokens,)](
            *(x, residual, weight, out, total, x.stride(0), residual.stride(0), eps, channels, block, add),
            num_warps=warps,
            **early_start(x),
        )
    return out, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the rows of `x` and scale them by `weight`.

    x [T, C] (channels adjacent), weight [C], the same floating dtype -> [T, C] in that dtype. The mean is taken in
    fp32; the normalized row is rounded to the dtype before the weight, as llama does. A weight in fp32 beside an `x` of
    16 bits is applied before the rounding, as gemma does.
    """
    if use_triton(x):
        return _launch_norm(x, x, weight, eps, add=False)[0]
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, then normalize: returns (rms_norm(x + residual), x + residual).

    x and residual [T, C], weight [C], one floating dtype -> two new tensors [T, C]; the sum is rounded to the dtype
    before it is normalized, so the pair equals the two operations done one after the other.
    """
    if use_triton(x):
        return _launch_norm(x, residual, weight, eps, add=True)
    return add_rms_norm_reference(x, residual, weight, eps)
