"""The gate of a feed-forward layer, by SiLU (llama) or GELU (gemma).

Shapes: T tokens, I intermediate channels.
Source: Shazeer, GLU Variants Improve Transformer, 2020 (SwiGLU, GEGLU).
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


def gelu_and_mul_reference(x: torch.Tensor, approximate: bool) -> torch.Tensor:
    """`gelu_and_mul` in torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh" if approximate else "none").mul_(up)


_SILU, _GELU, _GELU_TANH = range(3)


@triton_jit
def _gate_kernel(
    x_ptr: tensor,
    out_ptr: tensor,
    x_stride: tensor,
    channels: tensor,
    BLOCK_C: constexpr,
    GATE: constexpr,
    EARLY: constexpr,
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
    if GATE == 0:
        opened = gate32 / (1.0 + tl.exp(-gate32))
    elif GATE == 1:
        opened = 0.5 * gate32 * (1.0 + tl.erf(gate32 * 0.7071067811865476))
    else:
        # (1 + tanh(y)) / 2 is the logistic function of 2 y.
        opened = gate32 / (1.0 + tl.exp(-1.5957691216057308 * (gate32 + 0.044715 * gate32 * gate32 * gate32)))
    product = opened.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * channels + channel, product.to(gate.dtype), mask=real)


def _launch(x: torch.Tensor, gate: int) -> torch.Tensor:
    tokens, channels = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    if tokens:
        grid = (tokens, -(-channels // _BLOCK))
        _gate_kernel[grid](x, out, x.stride(0), channels, _BLOCK, gate, num_warps=4, **early_start(x))
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where x [T, 2 * I] (channels adjacent) holds the gate first -> [T, I] in the dtype of x."""
    return _launch(x, _SILU) if use_triton(x) else silu_and_mul_reference(x)


def gelu_and_mul(x: torch.Tensor, *, approximate: bool) -> torch.Tensor:
    """gelu(gate) * up, as `silu_and_mul`; approximate: by tanh (Hendrycks and Gimpel, 2016), else by erf."""
    if use_triton(x):
        return _launch(x, _GELU_TANH if approximate else _GELU)
    return gelu_and_mul_reference(x, approximate)
