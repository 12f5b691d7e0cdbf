"""The product of activations with a weight matrix, a token's result the same to the bit whatever stands beside it.

cuBLAS takes another algorithm for another number of tokens, and so another order of the sum over the inputs. Here that
order follows from the weight's shape alone: the inputs are cut into parts, each part is summed up from its first input
to its last in steps of BLOCK_K, and the parts' sums are added in their order. The number of tokens decides two things
that do not change it: how many tokens a program takes, and whether the parts of a tile are done by one program or by
several, whose sums a second kernel adds. The weight is the left side of the dot: its 64 rows make the matrix unit take
the same instruction, but for its width, for one token and for a thousand.

Shapes: T tokens, K input channels, N output channels, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from kernels.backend import (
    WIDEN_DOT,
    begin,
    constexpr,
    early_start,
    tensor,
    tl,
    triton_jit,
    triton_jit_for_any,
    use_triton,
)

_LEAST_PART = 1024  # inputs: a program of fewer has hardly begun when it ends
_PROGRAMS = 256  # that keep a large GPU's memory busy
_COMBINED = 1024  # output channels of a program that adds parts


@dataclass(frozen=True, slots=True)
class Tile:
    """Output channels and tokens of a program, warps, stages of the pipeline; apart: each part has a program."""

    channels: int
    tokens: int
    warps: int
    stages: int
    apart: bool = True


# By the most tokens that they are taken for. All of a dtype give the same bits; `tests/gpu` compares them.
_TILES = {
    16: Tile(64, 16, 4, 8),
    32: Tile(64, 32, 4, 6),
    64: Tile(128, 64, 4, 4),
    128: Tile(128, 128, 8, 3),
    256: Tile(128, 256, 8, 4),
}
# Of many tokens. Where there are parts, the registers hold two sums.
_WHOLE = Tile(128, 256, 8, 4, apart=False)
_IN_PARTS = Tile(128, 128, 8, 3, apart=False)
_EXACT = Tile(64, 32, 4, 2)  # fp32 has no matrix unit
_EXACT_LARGE = Tile(64, 32, 4, 2, apart=False)


def tile_of(tokens: int, parts: int, itemsize: int) -> Tile:
    """How products of so many tokens are cut."""
    if itemsize == 4:
        return _EXACT if tokens <= 256 else _EXACT_LARGE
    for most, tile in _TILES.items():
        if tokens <= most:
            return tile
    return _WHOLE if parts == 1 else _IN_PARTS


def depth_of(itemsize: int) -> int:
    """Inputs of one step of the sum."""
    return 32 if itemsize == 4 else 64


@lru_cache
def parts_of(outputs: int, inputs: int) -> int:
    """Into how many parts the sums of such a weight are cut: so that one token's product keeps the device busy."""
    parts = 1
    while 2 * parts * -(-outputs // 64) <= _PROGRAMS and inputs >= 2 * parts * _LEAST_PART:
        parts *= 2
    return parts


@triton_jit
def _sum_part(
    x_ptr: tensor,
    weight_ptr: tensor,
    channel: tensor,
    token: tensor,
    tokens: tensor,
    x_row: tensor,
    weight_row: tensor,
    weight_column: tensor,
    first: tensor,
    last: tensor,
    OUTPUTS: constexpr,
    INPUTS: constexpr,
    BLOCK_C: constexpr,
    BLOCK_T: constexpr,
    BLOCK_K: constexpr,
) -> tensor:
    """The sum over the inputs from `first` up to `last`: [BLOCK_C, BLOCK_T] fp32."""
    depth = tl.arange(0, BLOCK_K)
    # What lies beyond the edges is read from within and never stored: no mask in the loop.
    row = tl.where(channel < OUTPUTS, channel, 0)
    source = tl.where(token < tokens, token, 0)
    weight_at = weight_ptr + (row.to(tl.int64) * weight_row)[:, None] + (depth * weight_column)[None, :]
    x_at = x_ptr + (source.to(tl.int64) * x_row)[None, :] + depth[:, None]
    total = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    for at in tl.range(first, last, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            weight = tl.load(weight_at + at * weight_column)
            x = tl.load(x_at + at)
        else:
            inside = at + depth < INPUTS
            weight = tl.load(weight_at + at * weight_column, mask=inside[None, :], other=0.0)
            x = tl.load(x_at + at, mask=inside[:, None], other=0.0)
        if WIDEN_DOT:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(weight, x, total, input_precision="ieee")
    return total


@triton_jit_for_any(numbers=["tokens"])
def _linear_kernel(
    x_ptr: tensor,
    weight_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    tokens: tensor,
    x_row: tensor,
    weight_row: tensor,
    weight_column: tensor,
    OUTPUTS: constexpr,
    INPUTS: constexpr,
    PARTS: constexpr,
    APART: constexpr,
    BLOCK_C: constexpr,
    BLOCK_T: constexpr,
    BLOCK_K: constexpr,
    GROUP: constexpr,
    EARLY: constexpr,
) -> None:
    """A tile a program; APART: one part of its sums, which goes to out [P, T, N] in fp32."""
    begin(EARLY)
    # Tiles of GROUP rows of tokens run beside each other, so that they share what they read of both matrices.
    index = tl.program_id(0)
    across = (OUTPUTS + BLOCK_C - 1) // BLOCK_C
    down = tl.cdiv(tokens, BLOCK_T)
    leader = index // (GROUP * across) * GROUP
    height = tl.minimum(down - leader, GROUP)
    inside = index % (GROUP * across)
    token = (leader + inside % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = inside // height * BLOCK_C + tl.arange(0, BLOCK_C)
    SHARE: constexpr = ((INPUTS + BLOCK_K - 1) // BLOCK_K + PARTS - 1) // PARTS * BLOCK_K
    first = tl.program_id(1) * SHARE
    total = _sum_part(
        x_ptr, weight_ptr, channel, token, tokens, x_row, weight_row, weight_column, first,
        tl.minimum(first + SHARE, INPUTS), OUTPUTS, INPUTS, BLOCK_C, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if PARTS > 1 and not APART:
        for part in tl.range(1, PARTS, num_stages=1):
            first = part * SHARE
            total += _sum_part(
                x_ptr, weight_ptr, channel, token, tokens, x_row, weight_row, weight_column, first,
                tl.minimum(first + SHARE, INPUTS), OUTPUTS, INPUTS, BLOCK_C, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=channel < OUTPUTS, other=0.0).to(tl.float32)[:, None]
    row = token.to(tl.int64)
    if APART:
        row += tl.program_id(1).to(tl.int64) * tokens
    out_at = out_ptr + (row * OUTPUTS)[None, :] + channel[:, None]
    wanted = (channel < OUTPUTS)[:, None] & (token < tokens)[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=wanted)


@triton_jit_for_any(numbers=["tokens"])
def _combine_kernel(
    sum_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    tokens: tensor,
    OUTPUTS: constexpr,
    PARTS: constexpr,
    BLOCK_C: constexpr,
    EARLY: constexpr,
) -> None:
    """Some output channels of one token a program: the sums of the parts, added in their order."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = channel < OUTPUTS
    total = tl.load(sum_ptr + row * OUTPUTS + channel, mask=wanted, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sum_ptr + (part * tokens.to(tl.int64) + row) * OUTPUTS + channel, mask=wanted, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * OUTPUTS + channel, total.to(out_ptr.dtype.element_ty), mask=wanted)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """`invariant_linear` by the kernel. tile: how the launch is cut, None for what the shapes say."""
    tokens, (outputs, inputs) = len(x), weight.shape
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    parts = parts_of(outputs, inputs)
    tile = tile or tile_of(tokens, parts, x.element_size())
    apart = tile.apart and parts > 1
    target = torch.empty((parts, tokens, outputs), dtype=torch.float32, device=x.device) if apart else out
    early = early_start(x)
    tiles = -(-outputs // tile.channels) * -(-tokens // tile.tokens)
    _linear_kernel[(tiles, parts if apart else 1)](
        *(x, weight, None if apart else bias, target, tokens),
        *(x.stride(0), weight.stride(0), weight.stride(1)),
        *(outputs, inputs, parts, apart, tile.channels, tile.tokens, depth_of(x.element_size()), 8),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early,
    )
    if apart:
        _combine_kernel[(tokens, -(-outputs // _COMBINED))](
            *(target, bias, out, tokens, outputs, parts, _COMBINED), num_warps=4, **early
        )
    return out


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N] in the dtype of x; sums in fp32.

    x has adjacent channels. A row of the result depends on its row of x alone. Raises RuntimeError where the kernel
    cannot run: torch's products do not promise that.
    """
    if not use_triton(x):
        raise RuntimeError(f"there is no batch-invariant product on {x.device}")
    return product(x, weight, bias)


def padded_cost(tokens: int) -> float:
    """What products of so many tokens cost beside those of others: a tile's, however many of its tokens are real."""
    width = next((most for most in _TILES if tokens <= most), 128)
    return float(-(-tokens // width) * width)


def launches_of(weight: torch.Tensor, bias: torch.Tensor | None, tokens: int) -> list[Callable[[], None]]:
    """All different kernels that steps of up to `tokens` tokens launch for such a weight, each as a launch: called
    once, in any thread, so that no step waits for the compiler.
    """
    if not use_triton(weight):
        return []
    parts, size = parts_of(*weight.shape), weight.element_size()
    counts = [most for most in _TILES if most < tokens]

    def launch(tile: Tile) -> None:
        product(torch.zeros((1, weight.shape[1]), dtype=weight.dtype, device=weight.device), weight, bias, tile)

    return [partial(launch, tile) for tile in {tile_of(n, parts, size): None for n in (*counts, tokens)}]
