"""The product of activations with a weight matrix: torch's, but for a single token.

One token is bound by the reading of the weight, at which a plain kernel is faster than cuBLAS.

Shapes: T tokens, K input channels, N output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.backend import INTERPRETED, constexpr, tensor, tl, triton_jit, use_triton

_BLOCK_K = 2048


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
    STAGES: constexpr,
) -> None:
    """Some rows of the weight a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < outputs
    column = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
        if INPUTS % BLOCK_K == 0:
            x = tl.load(x_ptr + start + column)
            weight = tl.load(weight_at + start, mask=real[:, None], other=0.0, eviction_policy="evict_first")
        else:
            inside = start + column < INPUTS
            x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
            weight = tl.load(weight_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=real)


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of one token by the kernel: x [1, K], weight [N, K], channels adjacent."""
    outputs, inputs = weight.shape
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    rows, warps, stages = 1, 8, 3
    _gemv_kernel[(-(-outputs // rows),)](
        *(x, weight, out if bias is None else bias, out, outputs, weight.stride(0)),
        *(inputs, bias is not None, rows, _BLOCK_K, stages),
        num_warps=warps,
    )
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N] in the dtype of x; sums in fp32."""
    if len(x) == 1 and x.element_size() == 2 and use_triton(x) and not INTERPRETED and x.stride(1) == 1:
        return gemv(x, weight, bias)
    return F.linear(x, weight, bias)
