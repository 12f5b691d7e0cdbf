"""The inner loop of attention over the paged cache, shared by the prefill and the decode kernel.

Shapes: M query rows of one KV head (tokens times the heads of its group), N' key positions a tile, D head size, S block
size. Sources: Dao et al., FlashAttention-2, 2023; Kwon et al., PagedAttention, 2023; Milakov and Gimelshein, Online
normalizer calculation for softmax, 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import WIDEN_DOT, constexpr, tensor, tl, triton_jit


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What some models do to the scores. Kernels are compiled for what is there: the rest costs nothing.

    soft_cap: scores, scaled, become soft_cap * tanh(score / soft_cap); 0 for not. slopes [H] fp32: a score gets
    slope * (key position - query position) added (ALiBi; Press et al., 2021). sinks [H] fp32: a score of each head
    that takes part in the softmax and has no value (Xiao et al., Efficient Streaming Language Models, 2023).
    """

    soft_cap: float = 0.0
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done."""
        return not self.soft_cap and self.slopes is None and self.sinks is None


PLAIN = ScoreOptions()


@triton_jit
def find_tile(tile: tensor, cu_query_ptr: tensor, batch: tensor, BLOCK_B: constexpr, BLOCK_Q: constexpr) -> tensor:
    """Whose queries tile number `tile` has: (sequence, its first row, its queries, the first of them in the tile).

    Sequence b has its first tile at start // BLOCK_Q + b: room for every tile, without a sum over the lengths. There is
    nothing to do where the first query is below 0 or not below their number.
    """
    index = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_query_ptr + index, mask=index < batch, other=0)
    begun = (starts // BLOCK_Q + index <= tile) & (index < batch)
    b = tl.maximum(tl.sum(begun.to(tl.int32), axis=0) - 1, 0)
    start = tl.load(cu_query_ptr + b)
    count = tl.load(cu_query_ptr + b + 1) - start
    return b, start, count, (tile - (start // BLOCK_Q + b)) * BLOCK_Q


@triton_jit
def load_queries(
    q_ptr: tensor,
    start: tensor,
    lead: tensor,
    count: tensor,
    kv_head: tensor,
    q_row: tensor,
    q_head: tensor,
    GROUP: constexpr,
    SIZE: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_M: constexpr,
    BLOCK_D: constexpr,
) -> tensor:
    """A tile of queries: tokens times the heads of a group as rows.

    Returns q [M, D], and by row its token, its head, how many queries are before it in the tile, and whether it is one;
    the channels, and which of [M, D] is real.
    """
    row = tl.arange(0, BLOCK_M)
    ahead = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    wanted = (row < BLOCK_Q * GROUP) & (lead + ahead < count)
    real = wanted[:, None] & (channel < SIZE)[None, :]
    token = (start + lead + ahead).to(tl.int64)
    q_at = q_ptr + (token * q_row + head * q_head)[:, None] + channel[None, :]
    return tl.load(q_at, mask=real, other=0.0), token, head, ahead, wanted, channel, real


@triton_jit
def attend_tiles(
    q: tensor,
    acc: tensor,
    total: tensor,
    best: tensor,
    query_at: tensor,
    first: tensor,
    last: tensor,
    lowest: tensor,
    table_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    key_block: tensor,
    key_slot: tensor,
    value_block: tensor,
    value_slot: tensor,
    scale: tensor,
    slope: tensor,
    SIZE: constexpr,
    PAGE: constexpr,
    WINDOW: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    MASKED: constexpr,
    CAP: constexpr,
) -> tensor:
    """Attend from q [M, BLOCK_D] to the positions from `first` (a multiple of BLOCK_N) up to `last`.

    query_at [M] is the position of each row; acc [M, BLOCK_D], total [M] and best [M] carry the online softmax in
    powers of two; scale holds the factor log2(e). slope: None, or [M] in powers of two. CAP: the soft cap, 0 for none.
    The table, key and value pointers are at the sequence and at the KV head. Without MASKED, every row must see every
    position, and `last` be a multiple of BLOCK_N. With it, nothing below `lowest` or from `last` on is read, so that
    what lies there may be NaN.
    """
    channel = tl.arange(0, BLOCK_D)
    if WIDEN_DOT:
        q = q.to(tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        position = start + tl.arange(0, BLOCK_N)
        if PAGE % BLOCK_N == 0:
            # The tile lies in one block: one look at the table.
            page = tl.load(table_ptr + start // PAGE).to(tl.int64)
            key_at = key_ptr + page * key_block + (position % PAGE)[:, None] * key_slot + channel[None, :]
            value_at = value_ptr + page * value_block + (position % PAGE)[:, None] * value_slot + channel[None, :]
        else:
            if MASKED:
                known = (position >= lowest) & (position < last)
                page = tl.load(table_ptr + position // PAGE, mask=known, other=0).to(tl.int64)
            else:
                page = tl.load(table_ptr + position // PAGE).to(tl.int64)
            offset = position % PAGE
            key_at = key_ptr + (page * key_block + offset * key_slot)[:, None] + channel[None, :]
            value_at = value_ptr + (page * value_block + offset * value_slot)[:, None] + channel[None, :]
        if MASKED:
            real = ((position >= lowest) & (position < last))[:, None] & (channel < SIZE)[None, :]
            keys = tl.load(key_at, mask=real, other=0.0)
            values = tl.load(value_at, mask=real, other=0.0)
        elif SIZE < BLOCK_D:
            keys = tl.load(key_at, mask=(channel < SIZE)[None, :], other=0.0)
            values = tl.load(value_at, mask=(channel < SIZE)[None, :], other=0.0)
        else:
            keys = tl.load(key_at)
            values = tl.load(value_at)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        factor = scale
        if CAP > 0.0 or slope is not None:
            scores = scores * scale
            factor = 1.0
            if CAP > 0.0:
                # tanh(x) = 1 - 2 / (e^2x + 1), which is right at both infinities; both factors are powers of two.
                scores = 1.4426950408889634 * CAP * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / CAP)) + 1.0))
            if slope is not None:
                scores += slope[:, None] * (position[None, :] - query_at[:, None]).to(tl.float32)
        if MASKED:
            seen = (position[None, :] <= query_at[:, None]) & (position >= lowest)[None, :] & (position < last)[None, :]
            if WINDOW > 0:
                seen = seen & (position[None, :] > query_at[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, axis=1) * factor)
        # A row that has seen nothing yet would subtract infinity from infinity.
        base = tl.where(better == float("-inf"), 0.0, better)
        weights = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        best = better
    return acc, total, best
