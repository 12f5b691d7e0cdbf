"""Attention of one query token a sequence over the paged cache.

A long cache is split over several programs, whose partial softmaxes a second kernel combines (flash-decoding); the
heads of a group are the rows of one tile.

Shapes: B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a sequence.
Sources: Dao et al., Flash-Decoding, 2023; Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.attention_tile import PLAIN, ScoreOptions, attend_tiles
from kernels.backend import begin, constexpr, early_start, next_power_of_two, tensor, tl, triton_jit_for_any, use_triton
from kernels.kv_cache import Memo
from kernels.paged_dense import attend
from kernels.tuning import DecodeTuning, table_of

ORDERED_FROM = 257  # sequences: from here on it pays to let the longest begin first


def longest_first(kv_lens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The order in which `paged_decode` should get many sequences of these lengths, and its `rows`: a long one that
    begins last has the device to itself.
    """
    return np.argsort(-kv_lens, kind="stable")


def paged_decode_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    memo: Memo | None = None,
    rows: torch.Tensor | None = None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """`paged_decode` in torch."""
    if rows is None:
        return attend(q, key_cache, value_cache, block_tables, None, kv_lens, scale, window, out, memo, options)
    found = attend(q[rows], key_cache, value_cache, block_tables, None, kv_lens, scale, window, None, memo, options)
    return (torch.empty_like(q) if out is None else out).index_copy_(0, rows.long(), found)


@triton_jit_for_any(numbers=["splits", "table_row"])
def _decode_kernel(
    q_ptr: tensor,
    out_ptr: tensor,
    partial_ptr: tensor,
    weight_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    table_ptr: tensor,
    length_ptr: tensor,
    row_ptr: tensor,
    slope_ptr: tensor,
    sink_ptr: tensor,
    scale: tensor,
    splits: tensor,
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
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    SPLIT: constexpr,
    LEAST: constexpr,
    TAIL: constexpr,
    ORDERED: constexpr,
    CAP: constexpr,
    EARLY: constexpr,
) -> None:
    """One group of heads of one sequence and one of its splits a program. Heads of a sequence, which lie beside each
    other in the cache, run beside each other. TAIL: the last, part-filled tile has a loop of its own. ORDERED: which
    row of q is a sequence's is read.
    """
    kv_head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    begin(EARLY)
    kv_len = tl.load(length_ptr + b)
    at_row = b
    if ORDERED:
        at_row = tl.load(row_ptr + b).to(tl.int64)
    lowest = kv_len * 0
    if WINDOW > 0:
        lowest = tl.maximum(kv_len - WINDOW, 0)
    # The share of a split follows from the true length, so a captured graph divides any length evenly.
    tiles = tl.cdiv(kv_len, BLOCK_N) - lowest // BLOCK_N
    share = tl.maximum(tl.cdiv(tiles, splits), LEAST)
    first = (lowest // BLOCK_N + split * share) * BLOCK_N
    last = tl.minimum(first + share * BLOCK_N, kv_len)
    if SPLIT and first >= last:
        return
    row = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + row
    channel = tl.arange(0, BLOCK_D)
    real = (row < GROUP)[:, None] & (channel < SIZE)[None, :]
    q = tl.load(q_ptr + at_row * q_row + head[:, None] * q_head + channel[None, :], mask=real, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head, mask=row < GROUP, other=0.0) * 1.4426950408889634
    if sink_ptr is not None:
        # It takes part once, in the first split.
        best = tl.load(sink_ptr + head, mask=(row < GROUP) & (split == 0), other=float("-inf")) * 1.4426950408889634
        total += tl.where(split == 0, 1.0, 0.0)
    query_at = tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1)
    table = table_ptr + b * table_row
    keys, values = key_ptr + kv_head * key_head, value_ptr + kv_head * value_head
    whole = first
    if TAIL and WINDOW == 0:
        whole = tl.maximum(first, last // BLOCK_N * BLOCK_N)
        acc, total, best = attend_tiles(
            q, acc, total, best, query_at, first, whole, lowest, table, keys, values, key_block, key_slot, value_block,
            value_slot, scale, slope, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, False, CAP,
        )  # fmt: skip
    acc, total, best = attend_tiles(
        q, acc, total, best, query_at, whole, last, lowest, table, keys, values, key_block, key_slot, value_block,
        value_slot, scale, slope, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, True, CAP,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT and tiles > share:
        at = (b * HEADS + head) * splits + split
        tl.store(partial_ptr + at[:, None] * SIZE + channel[None, :], acc, mask=real)
        tl.store(weight_ptr + at, best + tl.log2(total), mask=row < GROUP)
    else:
        out_at = out_ptr + at_row * out_row + head[:, None] * out_head + channel[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real)


@triton_jit_for_any(numbers=["splits"])
def _combine_kernel(
    out_ptr: tensor,
    partial_ptr: tensor,
    weight_ptr: tensor,
    length_ptr: tensor,
    row_ptr: tensor,
    splits: tensor,
    out_row: tensor,
    out_head: tensor,
    HEADS: constexpr,
    SIZE: constexpr,
    WINDOW: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    BLOCK_S: constexpr,
    LEAST: constexpr,
    ORDERED: constexpr,
    EARLY: constexpr,
) -> None:
    """One head of one sequence a program: the partial results, weighted by their softmax totals."""
    begin(EARLY)
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_len = tl.load(length_ptr + b)
    tiles = tl.cdiv(kv_len, BLOCK_N)
    if WINDOW > 0:
        tiles -= tl.maximum(kv_len - WINDOW, 0) // BLOCK_N
    # Splits past the end of a short sequence have written nothing, and one that was alone has written the output.
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, splits), LEAST))
    if used == 1:
        return
    split = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    at = (b * HEADS + head) * splits + split
    weight = tl.load(weight_ptr + at, mask=split < used, other=float("-inf"))
    best = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(best == float("-inf"), 0.0, best))
    real = (split < used)[:, None] & (channel < SIZE)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * SIZE + channel[None, :], mask=real, other=0.0)
    total = tl.sum(weight, axis=0)
    result = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    if ORDERED:
        b = tl.load(row_ptr + b).to(tl.int64)
    out_at = out_ptr + b * out_row + head * out_head + channel
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=channel < SIZE)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tuning(q: torch.Tensor, kv_heads: int) -> DecodeTuning:
    batch, heads, size = q.shape
    return table_of(q.device).decode[q.element_size(), size, heads // kv_heads].at(batch * kv_heads)


def _splits(q: torch.Tensor, kv_heads: int, max_kv: int, window: int, tuning: DecodeTuning) -> int:
    reach = min(max_kv, window) if window else max_kv
    # At least two tiles a split: below that the second kernel costs more than it saves.
    useful = -(-reach // (max(2, tuning.least) * tuning.tile))
    wanted = tuning.programs * _multiprocessors(q.device)
    return max(1, min(wanted // max(1, len(q) * kv_heads), useful, 64))


def decode_workspace_size(
    q: torch.Tensor, kv_heads: int, max_kv: int, window: int = 0, tuning: DecodeTuning | None = None
) -> int:
    """How many fp32 elements of workspace `paged_decode` needs for such a q [B, H, D]; 0 if none."""
    splits = _splits(q, kv_heads, max_kv, window, tuning or _tuning(q, kv_heads))
    return 0 if splits == 1 else q.shape[0] * q.shape[1] * splits * (q.shape[2] + 1)


def _launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv: int,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    tuning: DecodeTuning | None,
    rows: torch.Tensor | None,
    options: ScoreOptions,
) -> None:
    batch, heads, size = q.shape
    _, page, kv_heads, _ = key_cache.shape
    tuning = tuning or _tuning(q, kv_heads)
    splits, group = _splits(q, kv_heads, max_kv, window, tuning), heads // kv_heads
    block_d = max(16, next_power_of_two(size))
    partials = weights = out
    if splits > 1:
        needed = batch * heads * splits * (size + 1)
        if workspace is None:
            workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
        partials, weights = (
            workspace[: batch * heads * splits * size],
            workspace[batch * heads * splits * size : needed],
        )
    _decode_kernel[(kv_heads, batch, splits)](
        *(q, out, partials, weights, key_cache, value_cache, block_tables, kv_lens, kv_lens if rows is None else rows),
        *(options.slopes, options.sinks, scale * 1.4426950408889634, splits),
        *(*q.stride()[:2], *out.stride()[:2], block_tables.stride(0)),
        *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
        *(heads, group, size, page, window, max(16, next_power_of_two(group)), tuning.tile, block_d),
        *(splits > 1, tuning.least, tuning.tail, rows is not None, options.soft_cap),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **early_start(q),
    )
    if splits > 1:
        _combine_kernel[(batch, heads)](
            *(out, partials, weights, kv_lens, kv_lens if rows is None else rows, splits, *out.stride()[:2]),
            *(heads, size, window, tuning.tile, block_d, next_power_of_two(splits), tuning.least, rows is not None),
            num_warps=4,
            **early_start(q),
        )


def paged_decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv: int,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    memo: Memo | None = None,
    tuning: DecodeTuning | None = None,
    rows: torch.Tensor | None = None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """Attention of the query at position kv_len - 1 of each sequence over that sequence's cache.

    q [B, H, D]; key_cache, value_cache [N, S, K, D] with the new token's own key and value stored; block_tables
    [B, M] int32; kv_lens [B] int32, 0 for a padding row, whose output is zeros; max_kv >= every kv_len, on the host;
    window: how many positions are seen, the query's own included, 0 for all. Returns [B, H, D] in the dtype of q,
    written to `out` if given. Block table entries and cache contents past kv_len (and before the window) are never
    used; they may be -1 and NaN. q, out and the caches have adjacent channels. workspace: fp32, of at least
    `decode_workspace_size` elements, for calls that may not allocate; its contents do not matter. memo: as in
    `paged_prefill`. tuning: how the launch is cut, None for what the device's table says. rows [B] int32, each once:
    which row of q is the query of sequence i, None for row i; see `longest_first`. options: what is done to the scores;
    the output of a padding row stays zeros.
    """
    if use_triton(q):
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(q):
            caches = (key_cache, value_cache, block_tables, kv_lens)
            _launch(q, *caches, max_kv, scale, window, out, workspace, tuning, rows, options)
        return out
    return paged_decode_reference(
        q, key_cache, value_cache, block_tables, kv_lens, scale, window, out, memo, rows, options
    )
