"""Attention over the paged cache, a token's result the same to the bit whatever runs beside it: as a decode, as a piece
of a prompt of any length, as a replay.

The cache is cut into spans at multiples of SPAN positions. A query attends to each span from nothing, in tiles from the
span's beginning, and the spans' results are merged in their order. Decodes and prompts take the same kernel with the
same tile of keys; its rows, which are queries, do not meet. So it changes nothing which queries share a program, or
whether one program goes through all spans of a sequence or several write theirs down for a second kernel, which merges
them alike.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a
sequence, P spans of a sequence.
Sources: Dao et al., FlashAttention-2 and Flash-Decoding, 2023; Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kernels.attention_tile import PLAIN, ScoreOptions, attend_tiles, find_tile, load_queries
from kernels.backend import (
    begin,
    constexpr,
    early_start,
    next_power_of_two,
    tensor,
    tl,
    triton_jit,
    triton_jit_for_any,
    use_triton,
)

SPAN = 256  # positions
_PROGRAMS = 512  # that keep a large GPU busy: fewer go through a long sequence side by side


@dataclass(frozen=True, slots=True)
class _Cut:
    """Query rows of a program, key positions of a tile, warps. By the heads' shape, but that many rows may be twice."""

    rows: int
    tile: int
    warps: int

    @staticmethod
    def of(q: torch.Tensor, kv_heads: int, most_rows: int) -> _Cut:
        """For sequences of up to `most_rows` rows."""
        _, heads, size = q.shape
        least = next_power_of_two(heads // kv_heads)
        if q.element_size() == 4:
            return _Cut(max(16, least), 32 if size <= 128 else 16, 4)
        # The matrix unit takes 64 rows: twice as many, by twice as many warps, are the same instructions.
        if least <= 64 and size <= 128 and most_rows > 64:
            return _Cut(128, 64, 8)
        return _Cut(max(64, least), 64 if size <= 128 else 32, 4 if size <= 128 else 8)


@triton_jit
def _merge(acc: tensor, total: tensor, best: tensor, span_acc: tensor, span_total: tensor, span_best: tensor) -> tensor:
    """What was seen before and one more span, as `attend_tiles` carries it. Explicit, so that no compiler chooses which
    product is added without being rounded.
    """
    better = tl.maximum(best, span_best)
    base = tl.where(better == float("-inf"), 0.0, better)
    old = tl.exp2(best - base)
    new = tl.exp2(span_best - base)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), span_acc * new[:, None])
    return acc, tl.fma(total, old, span_total * new), better


@triton_jit_for_any(
    numbers=["batch", "stride", "spans", "table_row"], pointers=["table_ptr", "cu_query_ptr", "length_ptr", "row_ptr"]
)
def _attention_kernel(
    q_ptr: tensor,
    out_ptr: tensor,
    partial_ptr: tensor,
    state_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    table_ptr: tensor,
    cu_query_ptr: tensor,
    length_ptr: tensor,
    row_ptr: tensor,
    slope_ptr: tensor,
    sink_ptr: tensor,
    batch: tensor,
    stride: tensor,
    spans: tensor,
    scale: tensor,
    q_row: tensor,
    q_head: tensor,
    out_row: tensor,
    out_head: tensor,
    table_row: tensor,
    key_block: tensor,
    key_slot: tensor,
    key_head: tensor,
    value_block: tensor,
    value_slot: tensor,
    value_head: tensor,
    HEADS: constexpr,
    GROUP: constexpr,
    SIZE: constexpr,
    PAGE: constexpr,
    WINDOW: constexpr,
    BLOCK_B: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    LENGTH: constexpr,
    APART: constexpr,
    CAP: constexpr,
    EARLY: constexpr,
) -> None:
    """BLOCK_Q tokens of one sequence and all heads of one group a program; without cu_query one token a sequence.

    LENGTH: positions of a span. APART: a program takes every `stride`-th of up to `spans` spans and writes them to
    partial [B, H, P, D] and state [B, H, P, 2].
    """
    kv_head = tl.program_id(0)
    begin(EARLY)
    if cu_query_ptr is None:
        b = tl.program_id(1)
        start = b
        if row_ptr is not None:
            start = tl.load(row_ptr + b)
        count = 1
        lead = 0
    else:
        # The last tiles of a sequence see most: they begin first.
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        b, start, count, lead = find_tile(tile, cu_query_ptr, batch, BLOCK_B, BLOCK_Q)
        if (lead < 0) | (lead >= count):
            return
    kv_len = tl.load(length_ptr + b)
    if cu_query_ptr is not None and kv_len == 0:
        return
    q, token, head, ahead, wanted, channel, real = load_queries(
        q_ptr, start, lead, count, kv_head, q_row, q_head, GROUP, SIZE, BLOCK_Q, BLOCK_M, BLOCK_D
    )
    first_query = kv_len - count + lead
    query_at = first_query + ahead
    last = tl.minimum(first_query + BLOCK_Q, kv_len)
    lowest = kv_len * 0
    if WINDOW > 0:
        lowest = tl.maximum(first_query - WINDOW + 1, 0)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head, mask=wanted, other=0.0) * 1.4426950408889634
    nothing = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    none = tl.zeros([BLOCK_M], tl.float32)
    unseen = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = nothing
    total = none
    best = unseen
    if sink_ptr is not None:
        best = tl.load(sink_ptr + head, mask=wanted, other=0.0) * 1.4426950408889634
        total += 1.0
    table = table_ptr + b.to(tl.int64) * table_row
    keys, values = key_ptr + kv_head * key_head, value_ptr + kv_head * value_head
    span = lowest // LENGTH
    if APART:
        span += tl.program_id(2)
    # One loop for all tiles of a span: two, with and without a mask, would put a tile here into one and there into the
    # other, and the compiler need not make the same of both.
    for at in tl.range(span, tl.cdiv(last, LENGTH), stride, num_stages=1):
        low = tl.maximum(at * LENGTH, lowest // BLOCK_N * BLOCK_N)
        span_acc, span_total, span_best = attend_tiles(
            q, nothing, none, unseen, query_at, low, tl.minimum(at * LENGTH + LENGTH, last), lowest, table, keys,
            values, key_block, key_slot, value_block, value_slot, scale, slope, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D,
            True, CAP,
        )  # fmt: skip
        if APART:
            place = (b.to(tl.int64) * HEADS + head) * spans + (at - lowest // LENGTH)
            tl.store(partial_ptr + place[:, None] * SIZE + channel[None, :], span_acc, mask=real)
            tl.store(state_ptr + place * 2, span_total, mask=wanted)
            tl.store(state_ptr + place * 2 + 1, span_best, mask=wanted)
        else:
            acc, total, best = _merge(acc, total, best, span_acc, span_total, span_best)
    if not APART:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_at = out_ptr + (token * out_row + head * out_head)[:, None] + channel[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real)


@triton_jit_for_any(numbers=["spans"], pointers=["length_ptr", "row_ptr"])
def _merge_kernel(
    out_ptr: tensor,
    partial_ptr: tensor,
    state_ptr: tensor,
    length_ptr: tensor,
    row_ptr: tensor,
    sink_ptr: tensor,
    spans: tensor,
    out_row: tensor,
    out_head: tensor,
    HEADS: constexpr,
    SIZE: constexpr,
    WINDOW: constexpr,
    BLOCK_H: constexpr,
    BLOCK_D: constexpr,
    LENGTH: constexpr,
    EARLY: constexpr,
) -> None:
    """Some heads of one sequence of one query a program."""
    begin(EARLY)
    b = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wanted = head < HEADS
    channel = tl.arange(0, BLOCK_D)
    real = wanted[:, None] & (channel < SIZE)[None, :]
    kv_len = tl.load(length_ptr + b)
    lowest = kv_len * 0
    if WINDOW > 0:
        lowest = tl.maximum(kv_len - WINDOW, 0)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    best = tl.full([BLOCK_H], float("-inf"), tl.float32)
    if sink_ptr is not None:
        best = tl.load(sink_ptr + head, mask=wanted, other=0.0) * 1.4426950408889634
        total += 1.0
    for at in tl.range(0, tl.cdiv(kv_len, LENGTH) - lowest // LENGTH):
        place = (b.to(tl.int64) * HEADS + head) * spans + at
        span_acc = tl.load(partial_ptr + place[:, None] * SIZE + channel[None, :], mask=real, other=0.0)
        span_total = tl.load(state_ptr + place * 2, mask=wanted, other=0.0)
        span_best = tl.load(state_ptr + place * 2 + 1, mask=wanted, other=float("-inf"))
        acc, total, best = _merge(acc, total, best, span_acc, span_total, span_best)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = b
    if row_ptr is not None:
        row = tl.load(row_ptr + b)
    out_at = out_ptr + (row.to(tl.int64) * out_row + head * out_head)[:, None] + channel[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real)


def _side_by_side(batch: int, kv_heads: int, max_kv: int, window: int) -> tuple[int, int]:
    """(programs of a decode's KV head, spans that it may have)."""
    spans = -(-max_kv // SPAN)
    if window:
        spans = min(spans, -(-window // SPAN) + 1)
    return max(1, min(spans, _PROGRAMS // max(1, batch * kv_heads))), spans


# A kernel looks for its sequence among so many: few sizes, since each is compiled.
_BATCHES = (16, 64, 1024, 16384)


def _launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor | None,
    kv_lens: torch.Tensor,
    rows: torch.Tensor | None,
    max_query: int,
    max_kv: int,
    scale: float,
    window: int,
    out: torch.Tensor,
    options: ScoreOptions,
) -> None:
    tokens, heads, size = q.shape
    _, page, kv_heads, _ = key_cache.shape
    batch, group = len(kv_lens), heads // kv_heads
    cut = _Cut.of(q, kv_heads, max_query * group)
    block_d, block_q = max(16, next_power_of_two(size)), cut.rows // group
    programs, spans, tiles, among = 1, 1, batch, 1
    if cu_query is None:
        programs, spans = _side_by_side(batch, kv_heads, max_kv, window)
    else:
        tiles += tokens // block_q
        among = next((most for most in _BATCHES if batch <= most), next_power_of_two(batch))
    partials = state = None
    if programs > 1:
        partials = torch.empty((batch, heads, spans, size), dtype=torch.float32, device=q.device)
        state = torch.empty((batch, heads, spans, 2), dtype=torch.float32, device=q.device)
    early = early_start(q)
    _attention_kernel[(kv_heads, tiles, programs)](
        *(q, out, partials, state, key_cache, value_cache, block_tables, cu_query, kv_lens, rows),
        *(options.slopes, options.sinks, batch, programs, spans, scale * 1.4426950408889634),
        *(*q.stride()[:2], *out.stride()[:2], block_tables.stride(0)),
        *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
        *(heads, group, size, page, window, among, block_q, cut.rows, cut.tile, block_d),
        *(SPAN, programs > 1, options.soft_cap),
        num_warps=cut.warps,
        num_stages=2,
        **early,
    )
    if programs > 1:
        block_h = min(4, next_power_of_two(heads))
        _merge_kernel[(batch, -(-heads // block_h))](
            *(out, partials, state, kv_lens, rows, options.sinks, spans, *out.stride()[:2]),
            *(heads, size, window, block_h, block_d, SPAN),
            num_warps=4,
            **early,
        )


def invariant_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor | None,
    kv_lens: torch.Tensor,
    max_query: int,
    max_kv: int,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens: as `kernels.paged_prefill.paged_prefill`, or, without
    `cu_query`, of one token a sequence, as `kernels.paged_decode.paged_decode`, whose arguments these are.

    A token's result depends on its query, its position and the cache at the positions that it sees, on nothing else.
    Raises RuntimeError where the kernel cannot run.
    """
    if not use_triton(q):
        raise RuntimeError(f"there is no batch-invariant attention on {q.device}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        _launch(
            q, key_cache, value_cache, block_tables, cu_query, kv_lens, rows, max_query, max_kv, scale, window, out,
            options,
        )  # fmt: skip
    return out


def launches_of(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tokens: int,
    sequences: int,
    window: int = 0,
    options: ScoreOptions = PLAIN,
) -> list[Callable[[], None]]:
    """All different kernels that prompts in steps of up to `tokens` query tokens of up to `sequences` sequences launch,
    each as a launch that attends nothing: called once, in any thread. q [1, H, D].
    """
    if not use_triton(q):
        return []
    kv_heads, group = key_cache.shape[2], q.shape[1] // key_cache.shape[2]
    queries = {_Cut.of(q, kv_heads, n * group): n for n in (tokens, 1)}
    batches = [most for most, above in zip(_BATCHES, (0, *_BATCHES), strict=False) if above < sequences]

    def launch(batch: int, max_query: int) -> None:
        nothing = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
        tables = torch.zeros((batch, 1), dtype=torch.int32, device=q.device)
        caches = (key_cache, value_cache, tables)
        out = torch.empty_like(q)
        _launch(q, *caches, nothing, nothing[1:], None, max_query, 1, 1.0, window, out, options)

    return [partial(launch, min(most, sequences), n) for most in batches for n in queries.values()]
