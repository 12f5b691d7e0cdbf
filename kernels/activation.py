"""The gate of llama's feed-forward layer.

Shapes: T tokens, I intermediate channels.
Source: Shazeer, GLU Variants Improve Transformer, 2020 (SwiGLU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.backend import begin, constexpr, early_start, tensor, tl, triton_jit, use_triton

_BLOCK = 1024


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul` in torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@triton_jit
def _silu_and_mul_kernel(
    x_ptr: tensor, out_ptr: tensor, x_stride: tensor, channels: tensor, BLOCK_C: constexpr, EARLY: constexpr
) -> None:
    """One part of a row a program."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    gate = tl.load(x_ptr + row * x_stride + channel, mask=real, other=0.0)
    up = tl.load(x_ptr + row * x_stride + channels + channel, mask=real, other=0.0)
    gate32 = gate.to(tl.float32)
    # Rounded between the two, as torch does it.
    silu = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * channels + channel, product.to(gate.dtype), mask=real)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where x [T, 2 * I] (channels adjacent) holds the gate first -> [T, I] in the dtype of x."""
    if use_triton(x):
        tokens, channels = x.shape[0], x.shape[1] // 2
        out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
        if tokens:
            grid = (tokens, -(-channels // _BLOCK))
            _silu_and_mul_kernel[grid](x, out, x.stride(0), channels, _BLOCK, num_warps=4, **early_start(x))
        return out
    return silu_and_mul_reference(x)
