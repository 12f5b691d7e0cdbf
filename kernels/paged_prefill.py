"""Causal attention of variable numbers of query tokens over the paged cache.

Tiles of query tokens, with all heads of a group as rows beside each other, run down the cache as far as they see. The
tiles of all sequences are numbered through, so no program is started for padding.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a
sequence, Q queries of a tile.
Sources: Dao et al., FlashAttention-2, 2023; Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.attention_tile import PLAIN, ScoreOptions, attend_tiles, find_tile, load_queries
from kernels.backend import constexpr, next_power_of_two, tensor, tl, triton_jit_for_any, use_triton
from kernels.kv_cache import Memo
from kernels.paged_dense import attend
from kernels.tuning import PrefillTuning, table_of


def paged_prefill_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    memo: Memo | None = None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """`paged_prefill` in torch; tokens past cu_query[B] become zeros."""
    return attend(q, key_cache, value_cache, block_tables, cu_query, kv_lens, scale, window, out, memo, options)


@triton_jit_for_any(numbers=["batch", "table_row"], pointers=["table_ptr", "cu_query_ptr", "length_ptr"])
def _prefill_kernel(
    q_ptr: tensor,
    out_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    table_ptr: tensor,
    cu_query_ptr: tensor,
    length_ptr: tensor,
    slope_ptr: tensor,
    sink_ptr: tensor,
    batch: tensor,
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
    GROUP: constexpr,
    SIZE: constexpr,
    PAGE: constexpr,
    WINDOW: constexpr,
    BLOCK_B: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    CAP: constexpr,
) -> None:
    """BLOCK_Q tokens of one sequence and all heads of one group a program."""
    # The last tiles of a sequence see most: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    b, start, count, begin = find_tile(tile, cu_query_ptr, batch, BLOCK_B, BLOCK_Q)
    if (begin < 0) | (begin >= count):
        return
    kv_len = tl.load(length_ptr + b)
    if kv_len == 0:
        return
    q, token, head, ahead, _, channel, real = load_queries(
        q_ptr, start, begin, count, kv_head, q_row, q_head, GROUP, SIZE, BLOCK_Q, BLOCK_M, BLOCK_D
    )
    lead = kv_len - count + begin
    query_at = lead + ahead
    last = tl.minimum(lead + BLOCK_Q, kv_len)
    lowest = kv_len * 0
    if WINDOW > 0:
        lowest = tl.maximum(lead - WINDOW + 1, 0)
    first = lowest // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head) * 1.4426950408889634
    if sink_ptr is not None:
        best = tl.load(sink_ptr + head) * 1.4426950408889634
        total += 1.0
    table = table_ptr + b.to(tl.int64) * table_row
    keys, values = key_ptr + kv_head * key_head, value_ptr + kv_head * value_head
    whole = first
    if WINDOW == 0:
        whole = (lead + 1) // BLOCK_N * BLOCK_N
        acc, total, best = attend_tiles(
            q, acc, total, best, query_at, first, whole, lowest, table, keys, values, key_block, key_slot, value_block,
            value_slot, scale, slope, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, False, CAP,
        )  # fmt: skip
    acc, total, best = attend_tiles(
        q, acc, total, best, query_at, whole, last, lowest, table, keys, values, key_block, key_slot, value_block,
        value_slot, scale, slope, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, True, CAP,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out_ptr + (token * out_row + head * out_head)[:, None] + channel[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real)


# A kernel looks for its sequence among so many: few sizes, since each is compiled.
_BATCHES = (16, 64, 1024, 16384)


def _among(batch: int) -> int:
    return next((most for most in _BATCHES if batch <= most), next_power_of_two(batch))


def _rows(tuning: PrefillTuning, max_query: int, group: int) -> int:
    """A power of two of rows; a group that is none leaves some of them empty."""
    return max(16, next_power_of_two(group), min(tuning.rows, next_power_of_two(max_query * group)))


def _launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor,
    kv_lens: torch.Tensor,
    max_query: int,
    scale: float,
    window: int,
    out: torch.Tensor,
    tuning: PrefillTuning | None,
    options: ScoreOptions,
) -> None:
    tokens, heads, size = q.shape
    _, page, kv_heads, _ = key_cache.shape
    batch, group = len(kv_lens), heads // kv_heads
    block_d = max(16, next_power_of_two(size))
    tuning = tuning or table_of(q.device).prefill[q.element_size(), size, group].at(max_query)
    block_m = _rows(tuning, max_query, group)
    block_q = block_m // group
    _prefill_kernel[(tokens // block_q + batch, kv_heads)](
        *(q, out, key_cache, value_cache, block_tables, cu_query, kv_lens),
        *(options.slopes, options.sinks, batch, scale * 1.4426950408889634),
        *(*q.stride()[:2], *out.stride()[:2], block_tables.stride(0)),
        *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
        *(group, size, page, window, _among(batch), block_q, block_m, tuning.tile, block_d, options.soft_cap),
        num_warps=tuning.warps if block_m >= tuning.rows else min(tuning.warps, tuning.warps_of_few),
        num_stages=tuning.stages,
    )


def paged_prefill(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor,
    kv_lens: torch.Tensor,
    max_query: int,
    max_kv: int,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    memo: Memo | None = None,
    tuning: PrefillTuning | None = None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over that sequence's cache.

    q [T, H, D], the sequences one after the other; cu_query [B + 1] int32, where each begins and the last ends;
    key_cache, value_cache [N, S, K, D] with the new tokens' own keys and values stored; block_tables [B, M] int32;
    kv_lens [B] int32: the queries of a sequence are the last of its kv_len positions, and the tokens of one with kv_len
    0 are left alone (by the reference: zeros); max_query and max_kv: bounds of the two lengths, on the host; window:
    how many positions a query sees, its own included, 0 for all. Returns [T, H, D] in the dtype of q, written to `out`
    if given. Block table entries and cache contents past kv_len (and before the first window) are never used; they may
    be -1 and NaN. q, out and the caches have adjacent channels. Tokens before cu_query[0] are left alone; those past
    cu_query[B] are padding, whose output is not defined. memo: a dict kept for the layers of a step, if their tables,
    lengths and shapes are the same: the reference then finds its way through the cache once. tuning: how the launch is
    cut, None for what the device's table says. options: what is done to the scores.
    """
    if use_triton(q):
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(q):
            _launch(
                q, key_cache, value_cache, block_tables, cu_query, kv_lens, max_query, scale, window, out, tuning,
                options,
            )  # fmt: skip
        return out
    return paged_prefill_reference(
        q, key_cache, value_cache, block_tables, cu_query, kv_lens, scale, window, out, memo, options
    )


def launches_of(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tokens: int,
    sequences: int,
    window: int = 0,
    options: ScoreOptions = PLAIN,
) -> list[Callable[[], None]]:
    """All different kernels that steps of up to `tokens` query tokens of up to `sequences` sequences launch, each as a
    launch that attends nothing: called once, in any thread, so that no step waits for the compiler. q [1, H, D].
    """
    if not use_triton(q):
        return []
    heads, kv_heads, size = q.shape[1], key_cache.shape[2], q.shape[2]
    group = heads // kv_heads
    steps = table_of(q.device).prefill[q.element_size(), size, group]
    queries = {1 << i for i in range(tokens.bit_length())} | {tokens, *(b for b in steps.bounds if b <= tokens)}
    shapes = {(steps.at(n), _rows(steps.at(n), n, group)): n for n in sorted(queries)}
    batches = [most for most, above in zip(_BATCHES, (0, *_BATCHES), strict=False) if above < sequences]

    def launch(batch: int, max_query: int) -> None:
        nothing = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
        tables = torch.zeros((batch, 1), dtype=torch.int32, device=q.device)
        out = torch.empty_like(q)
        _launch(q, key_cache, value_cache, tables, nothing, nothing[1:], max_query, 1.0, window, out, None, options)

    return [partial(launch, min(most, sequences), n) for most in batches for n in shapes.values()]
