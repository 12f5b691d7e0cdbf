"""The product of activations with a weight matrix: torch's, but for a single token.

One token is bound by the reading of the weight, at which a plain kernel is faster than cuBLAS.

Shapes: T tokens, K input channels, N output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.backend import (
    INTERPRETED,
    begin,
    constexpr,
    early_start,
    next_power_of_two,
    tensor,
    tl,
    triton_jit,
    use_triton,
)
from kernels.tuning import GemvTuning, table_of

_MOST_INPUTS = 16384  # of a row that one program holds in registers


@triton_jit
def _gemv_kernel(
    x_ptr: tensor,
    weight_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    outputs: tensor,
    weight_row: tensor,
    INPUTS: constexpr,
    BIAS: constexpr,
    ROWS: constexpr,
    BLOCK_K: constexpr,
    EARLY: constexpr,
) -> None:
    """Some whole rows of the weight a program; they are under way before the kernel ahead has ended."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < outputs
    column = tl.arange(0, BLOCK_K)
    inside = column < INPUTS
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    weight = tl.load(weight_at, mask=real[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
    begin(EARLY)
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    total = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=real)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    tuning: GemvTuning | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`linear` of one token by the kernel: x [1, K], weight [N, K], channels adjacent.

    tuning: how the launch is cut, None for what the device's table says. dtype: of the result, None for that of x.
    """
    outputs, inputs = weight.shape
    tuning = tuning or table_of(x.device).gemv[outputs, inputs]
    out = torch.empty((1, outputs), dtype=dtype or x.dtype, device=x.device)
    _gemv_kernel[(-(-outputs // tuning.rows),)](
        *(x, weight, out if bias is None else bias, out, outputs, weight.stride(0)),
        *(inputs, bias is not None, tuning.rows, next_power_of_two(inputs)),
        num_warps=tuning.warps,
        **early_start(x),
    )
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N] in the dtype of x; sums in fp32."""
    return gemv(x, weight, bias) if _is_gemv(x, weight) else F.linear(x, weight, bias)


def linear_wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` whose result [T, N] is fp32, not rounded to the dtype of x."""
    if x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    if _is_gemv(x, weight):
        return gemv(x, weight, bias, dtype=torch.float32)
    if x.is_cuda:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return out if bias is None else out + bias.float()
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes this product."""
    return (
        len(x) == 1 and x.element_size() == 2 and weight.shape[1] <= _MOST_INPUTS and use_triton(x) and not INTERPRETED
    )
