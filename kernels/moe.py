"""Products of tokens with the matrices of the experts that they were sent to.

The (token, choice) entries are sorted by expert (`kernels.routing`). Each expert's entries are cut into tiles; those of
all experts are numbered through, so that one launch of a size known on the host does every product, however the tokens
were spread. A single token has kernels of its own (`kernels.expert_gemv`).

Shapes: T tokens, K experts a token, E experts, M = T * K entries, I input channels, O output channels.
Source: Gale et al., MegaBlocks, 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels.backend import (
    WIDEN_DOT,
    begin,
    constexpr,
    early_start,
    next_power_of_two,
    tensor,
    tl,
    triton_jit_for_any,
    use_triton,
)
from kernels.expert_gemv import expert_rows, expert_sum, fits
from kernels.routing import Routing, route

_TILES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch of `grouped_linear` is cut: entries, output and input channels of a tile, warps, stages."""

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int


def grouped_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_linear` in torch; on CUDA it waits for the device."""
    order, starts = routing.order, routing.starts.tolist()
    out = torch.empty((len(order), weight.shape[1]), dtype=x.dtype, device=x.device)
    for expert, (first, last) in enumerate(pairwise(starts)):
        if first == last:
            continue
        entries = order[first:last]
        offset = None if bias is None else bias[expert]
        if shares is None:
            rows = x.index_select(0, torch.div(entries, routing.choices, rounding_mode="floor"))
            out[first:last] = F.linear(rows, weight[expert], offset)
        else:
            share = shares.flatten().index_select(0, entries).unsqueeze(1)
            found = F.linear(x[first:last], weight[expert], offset) * share
            out.index_copy_(0, entries, found.to(out.dtype))
    return out


@triton_jit_for_any(numbers=["entries"])
def _grouped_kernel(
    x_ptr: tensor,
    weight_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    order_ptr: tensor,
    start_ptr: tensor,
    share_ptr: tensor,
    entries: tensor,
    x_row: tensor,
    weight_expert: tensor,
    weight_row: tensor,
    EXPERTS: constexpr,
    CHOICES: constexpr,
    INPUTS: constexpr,
    OUTPUTS: constexpr,
    BLOCK_E: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    EARLY: constexpr,
) -> None:
    """BLOCK_M entries of one expert times BLOCK_N of its output channels a program."""
    begin(EARLY)
    tile = tl.program_id(0)
    # Expert e has its first tile at start // BLOCK_M + e: room for every tile, without a sum over the counts.
    index = tl.arange(0, BLOCK_E)
    starts = tl.load(start_ptr + index, mask=index < EXPERTS, other=0)
    begun = (starts // BLOCK_M + index <= tile) & (index < EXPERTS)
    expert = tl.sum(begun.to(tl.int32), axis=0) - 1
    first = tl.load(start_ptr + expert)
    last = tl.load(start_ptr + expert + 1)
    first += (tile - (first // BLOCK_M + expert)) * BLOCK_M
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_M)
    real = row < last
    entry = tl.load(order_ptr + row, mask=real, other=0)
    source = row.to(tl.int64)
    target = row.to(tl.int64)
    if share_ptr is not None:
        target = entry
    else:
        source = entry // CHOICES
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = channel < OUTPUTS
    depth = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (source * x_row)[:, None] + depth[None, :]
    matrix = weight_ptr + expert.to(tl.int64) * weight_expert
    weight_at = matrix + (channel.to(tl.int64) * weight_row)[None, :] + depth[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in tl.range(0, INPUTS, BLOCK_K):
        inside = at + depth < INPUTS
        x = tl.load(x_at + at, mask=real[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at + at, mask=wanted[None, :] & inside[:, None], other=0.0)
        if WIDEN_DOT:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + expert * OUTPUTS + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if share_ptr is not None:
        # Rounded between the two, as the reference does it.
        share = tl.load(share_ptr + entry, mask=real, other=0.0).to(tl.float32)
        total = total.to(out_ptr.dtype.element_ty).to(tl.float32) * share[:, None]
    out_at = out_ptr + (target * OUTPUTS)[:, None] + channel[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & wanted[None, :])


def _tile(entries: int, experts: int) -> int:
    """Rows of a tile: half as many again as an expert has entries when they are spread evenly.

    An expert of two tiles has its matrix read twice.
    """
    return min(_TILES[-1], max(_TILES[0], next_power_of_two(-(-3 * entries // (2 * experts)))))


def cut_of(rows: int, itemsize: int) -> Cut:
    """The cut of tiles of so many rows; for 16 bits as benchmarks/moe_cuts.py found it on an H200."""
    if itemsize == 4:
        return Cut(rows, 64, 32, 8 if rows == 128 else 4, 3)
    if rows <= 32:
        return Cut(rows, 64, 128, 4, 4) if rows == 16 else Cut(rows, 128, 128, 8, 3)
    return Cut(rows, 128, 64, 4, 4) if rows == 64 else Cut(rows, 128, 64, 8, 3)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    shares: torch.Tensor | None,
    cut: Cut,
) -> torch.Tensor:
    entries, (experts, outputs, inputs) = len(routing.order), weight.shape
    out = torch.empty((entries, outputs), dtype=x.dtype, device=x.device)
    if not entries:
        return out
    _grouped_kernel[(entries // cut.rows + experts, -(-outputs // cut.channels))](
        *(x, weight, bias, out, routing.order, routing.starts, shares, entries),
        *(x.stride(0), weight.stride(0), weight.stride(1)),
        *(experts, routing.choices, inputs, outputs),
        *(next_power_of_two(experts), cut.rows, cut.channels, cut.depth),
        num_warps=cut.warps,
        num_stages=cut.stages,
        **early_start(x),
    )
    return out


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    shares: torch.Tensor | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """Each entry's row times its expert's matrix: weight [E, O, I], channels adjacent, bias [E, O] or None.

    Without `shares`, x is [T, I] and the result [M, O] has the entries by expert. With them ([T, K]: how much each
    choice counts), x is [M, I] with the entries by expert, and the result [M, O] has them in order, multiplied.
    cut: how the launch is cut, None for what suits the number of entries.
    """
    if use_triton(x):
        cut = cut or cut_of(_tile(len(routing.order), len(weight)), x.element_size())
        return _launch(x, weight, bias, routing, shares, cut)
    return grouped_linear_reference(x, weight, bias, routing, shares)


def launches_of(
    weight: torch.Tensor, bias: torch.Tensor | None, tokens: int, choices: int, *, shared: bool
) -> list[Callable[[], None]]:
    """All different kernels that `grouped_linear` launches in steps of up to `tokens` tokens, each as a launch without
    entries: called once, in any thread, so that no step waits for the compiler. shared: with shares.
    """
    if not use_triton(weight):
        return []
    experts, _, inputs = weight.shape
    most = _tile(tokens * choices, experts)

    def launch(rows: int) -> None:
        nothing = torch.zeros(experts + 1, dtype=torch.int32, device=weight.device)
        routing = Routing(torch.zeros(1, dtype=torch.int64, device=weight.device), nothing, choices)
        x = torch.empty((1, inputs), dtype=weight.dtype, device=weight.device)
        shares = torch.zeros((1, 1), dtype=torch.float32, device=weight.device) if shared else None
        _launch(x, weight, bias, routing, shares, cut_of(rows, weight.element_size()))

    return [partial(launch, rows) for rows in _TILES if rows <= most]


def mixture(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each token's experts: x [T, C], gate_up [E, 2 * N, C], down [E, C, N], experts and shares [T, K].

    gate makes [M, N] out of [M, 2 * N]. Returns [T, C] in the dtype of x.
    """
    if fits(x, gate_up, down):
        return expert_sum(gate(expert_rows(x, gate_up, gate_up_bias, experts)), down, down_bias, experts, shares)
    routing = route(experts, len(gate_up))
    inner = gate(grouped_linear(x, gate_up, gate_up_bias, routing))
    out = grouped_linear(inner, down, down_bias, routing, shares)
    return out.view(len(x), routing.choices, -1).sum(dim=1)
