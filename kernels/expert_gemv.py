"""A single token's experts: bound by the reading of their matrices, which are read row by row as in `kernels.linear`.

Shapes: K experts of the token, E experts, C channels, N inner channels.
"""

from __future__ import annotations

import torch

from kernels.backend import (
    begin,
    constexpr,
    early_start,
    next_power_of_two,
    tensor,
    tl,
    triton_jit,
    use_triton,
)

_MOST_INPUTS = 16384  # of a row that one program holds in registers
_PROGRAM = 8192  # numbers of weights that a program is given


@triton_jit
def _rows_kernel(
    x_ptr: tensor,
    weight_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    expert_ptr: tensor,
    weight_expert: tensor,
    weight_row: tensor,
    INPUTS: constexpr,
    OUTPUTS: constexpr,
    ROWS: constexpr,
    BLOCK_K: constexpr,
    EARLY: constexpr,
) -> None:
    """Some whole rows of one choice's matrix a program."""
    begin(EARLY)
    choice = tl.program_id(1)
    expert = tl.load(expert_ptr + choice)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    real, inside = row < OUTPUTS, column < INPUTS
    weight_at = weight_ptr + expert * weight_expert + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    weight = tl.load(weight_at, mask=real[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    total = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + expert * OUTPUTS + row, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + choice * OUTPUTS + row, total.to(out_ptr.dtype.element_ty), mask=real)


@triton_jit
def _sum_kernel(
    x_ptr: tensor,
    weight_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    expert_ptr: tensor,
    share_ptr: tensor,
    weight_expert: tensor,
    weight_row: tensor,
    INPUTS: constexpr,
    OUTPUTS: constexpr,
    CHOICES: constexpr,
    ROWS: constexpr,
    BLOCK_K: constexpr,
    EARLY: constexpr,
) -> None:
    """Some rows of all choices' matrices a program, weighed and added up."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    real, inside = row < OUTPUTS, column < INPUTS
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * weight_row + column[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(CHOICES):
        expert = tl.load(expert_ptr + choice)
        share = tl.load(share_ptr + choice)
        weight = tl.load(
            weight_at + expert * weight_expert,
            mask=real[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + choice * INPUTS + column, mask=inside, other=0.0)
        found = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        if bias_ptr is not None:
            found += tl.load(bias_ptr + expert * OUTPUTS + row, mask=real, other=0.0).to(tl.float32)
        # Rounded where the products of many tokens are.
        found = found.to(out_ptr.dtype.element_ty).to(tl.float32) * share
        total += found.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=real)


def fits(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether x [T, C] is a single token for these kernels."""
    return len(x) == 1 and max(gate_up.shape[2], down.shape[2]) <= _MOST_INPUTS and use_triton(x)


def _cut(block: int, matrices: int = 1) -> tuple[int, int]:
    """Rows and warps of a program that reads rows of `block` numbers of so many matrices."""
    rows = min(8, _PROGRAM // (block * matrices) or 1)
    rows = next_power_of_two(rows + 1) // 2
    return rows, max(1, min(8, rows * block // 1024))


def expert_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor
) -> torch.Tensor:
    """x [1, C] times the matrices [E, O, C] of its `experts` [1, K], bias [E, O] -> [K, O]."""
    _, outputs, inputs = weight.shape
    block, choices = next_power_of_two(inputs), experts.shape[1]
    rows, warps = _cut(block)
    out = torch.empty((choices, outputs), dtype=x.dtype, device=x.device)
    _rows_kernel[(-(-outputs // rows), choices)](
        *(x, weight, bias, out, experts, weight.stride(0), weight.stride(1)),
        *(inputs, outputs, rows, block),
        num_warps=warps,
        **early_start(x),
    )
    return out


def expert_sum(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """x [K, N] times the matrices [E, C, N] of `experts` [1, K], weighed by `shares` [1, K] and added up -> [1, C]."""
    _, outputs, inputs = weight.shape
    block, choices = next_power_of_two(inputs), experts.shape[1]
    rows, warps = _cut(block, choices)
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    _sum_kernel[(-(-outputs // rows),)](
        *(x, weight, bias, out, experts, shares, weight.stride(0), weight.stride(1)),
        *(inputs, outputs, choices, rows, block),
        num_warps=warps,
        **early_start(x),
    )
    return out
