"""Causal attention of variable numbers of query tokens over the paged cache.

Tiles of query tokens, with all heads of a group as rows beside each other, run down the cache as far as they see. The
tiles of all sequences are numbered through, so no program is started for padding.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a
sequence, Q queries of a tile.
Sources: Dao et al., FlashAttention-2, 2023; Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from kernels.attention_tile import attend_tiles
from kernels.backend import constexpr, next_power_of_two, tensor, tl, triton_jit, use_triton

# Elements of keys gathered at a time: what stays in a core's cache.
_CHUNK = 1 << 17


def paged_prefill_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """`paged_prefill` in torch, computed in fp32; on CUDA it waits for the device.

    Sequences of like lengths share one dense attention: a batch of many decodes and few prompts costs a handful of
    calls and a small multiple of its arithmetic, however it is mixed.
    """
    starts, lens = cu_query.tolist(), kv_lens.tolist()
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for b, kv_len in enumerate(lens):
        queries = starts[b + 1] - starts[b]
        if queries and kv_len:
            # Powers of two, but one bucket for all that is short: there a call costs more than padding.
            wide = max(4, (queries - 1).bit_length()) if queries > 1 else 0
            buckets[wide, max(6, (kv_len - 1).bit_length())].append(b)
    out = q.new_zeros(q.shape)
    for rows in buckets.values():
        queries = max(starts[b + 1] - starts[b] for b in rows)
        span = max(lens[b] for b in rows)
        tables, start, count, length = (
            column[torch.tensor(rows, device=q.device)].long()
            for column in (block_tables, cu_query[:-1], cu_query.diff(), kv_lens)
        )
        _attend(q, key_cache, value_cache, tables, start, count, length, queries, span, scale, window, out)
    return out


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    length: torch.Tensor,
    queries: int,
    span: int,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Attend for one bucket, padded to `queries` x `span`, and write its tokens of `out`."""
    batch = len(length)
    _, block_size, kv_heads, size = key_cache.shape
    group = q.shape[1] // kv_heads
    start, count, length = start.unsqueeze(1), count.unsqueeze(1), length.unsqueeze(1)
    step = torch.arange(queries, device=q.device)
    token = start + torch.minimum(step, count - 1)
    query_at = (length - count + torch.minimum(step, count - 1)).unsqueeze(2)
    position = torch.arange(span, device=q.device)
    unseen = position > query_at
    reached = position < length
    if window:
        unseen |= position <= query_at - window
        reached &= position > length - count - window
    slot = tables[:, : -(-span // block_size), None] * block_size + torch.arange(block_size, device=q.device)
    # What is not seen may be NaN, which no mask removes: the newest token stands in for it.
    newest = tables.gather(1, (length - 1) // block_size) * block_size + (length - 1) % block_size
    slot = torch.where(reached, slot.flatten(1)[:, :span], newest)
    # One matrix a KV head; the heads of its group are rows beside each other, so no key is repeated.
    index = slot.unsqueeze(1) * kv_heads + torch.arange(kv_heads, device=q.device).unsqueeze(1)
    rows = (q[token].float() * scale).view(batch, queries, kv_heads, group, size).transpose(1, 2)
    rows = rows.reshape(batch, kv_heads, queries * group, size)
    result = rows.new_empty(rows.shape)
    chunk = max(1, _CHUNK // (span * kv_heads * size))
    for begin in range(0, batch, chunk):
        part = slice(begin, begin + chunk)
        keys, values = (
            cache.view(-1, size).index_select(0, index[part].flatten()).view(-1, span, size).float()
            for cache in (key_cache, value_cache)
        )
        scores = torch.bmm(rows[part].flatten(0, 1), keys.transpose(1, 2))
        scores.view(-1, kv_heads, queries, group, span).masked_fill_(unseen[part, None, :, None], -torch.inf)
        torch.bmm(scores.softmax(dim=-1), values, out=result[part].flatten(0, 1))
    result = result.view(batch, kv_heads, queries, group, size).transpose(1, 2).reshape(batch, queries, -1, size)
    if queries == 1:
        out[token.flatten()] = result.flatten(0, 1).to(out.dtype)
    else:
        real = step < count
        out[token[real]] = result[real].to(out.dtype)


@triton_jit
def _prefill_kernel(
    q_ptr: tensor,
    out_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    table_ptr: tensor,
    cu_query_ptr: tensor,
    length_ptr: tensor,
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
) -> None:
    """BLOCK_Q tokens of one sequence and all heads of one group a program."""
    # The last tiles of a sequence see most: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    # Sequence b has its first tile at start // BLOCK_Q + b: room for every tile, without a sum over the lengths.
    index = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_query_ptr + index, mask=index < batch, other=0)
    begun = (starts // BLOCK_Q + index <= tile) & (index < batch)
    b = tl.sum(begun.to(tl.int32), axis=0) - 1
    start = tl.load(cu_query_ptr + b)
    count = tl.load(cu_query_ptr + b + 1) - start
    begin = (tile - (start // BLOCK_Q + b)) * BLOCK_Q
    if begin >= count:
        return
    kv_len = tl.load(length_ptr + b)
    row = tl.arange(0, BLOCK_M)
    query = begin + row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    wanted = (row < BLOCK_Q * GROUP) & (query < count)
    real = wanted[:, None] & (channel < SIZE)[None, :]
    token = (start + query).to(tl.int64)
    q_at = q_ptr + (token * q_row + head * q_head)[:, None] + channel[None, :]
    q = tl.load(q_at, mask=real, other=0.0)
    lead = kv_len - count + begin
    query_at = lead + row // GROUP
    last = tl.minimum(lead + BLOCK_Q, kv_len)
    lowest = kv_len * 0
    if WINDOW > 0:
        lowest = tl.maximum(lead - WINDOW + 1, 0)
    first = lowest // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = table_ptr + b.to(tl.int64) * table_row
    keys, values = key_ptr + kv_head * key_head, value_ptr + kv_head * value_head
    whole = first
    if WINDOW == 0:
        whole = (lead + 1) // BLOCK_N * BLOCK_N
        acc, total, best = attend_tiles(
            q, acc, total, best, query_at, first, whole, lowest, table, keys, values, key_block, key_slot, value_block,
            value_slot, scale, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    acc, total, best = attend_tiles(
        q, acc, total, best, query_at, whole, last, lowest, table, keys, values, key_block, key_slot, value_block,
        value_slot, scale, SIZE, PAGE, WINDOW, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out_ptr + (token * out_row + head * out_head)[:, None] + channel[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real)


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
) -> None:
    tokens, heads, size = q.shape
    _, page, kv_heads, _ = key_cache.shape
    batch, group = len(kv_lens), heads // kv_heads
    block_d = max(16, next_power_of_two(size))
    # The largest tiles that a Hopper holds without spilling registers; fp32 has no matrix unit and needs small ones.
    precise, wide = q.dtype == torch.float32, block_d > (64 if q.dtype == torch.float32 else 128)
    block_m = min(32 if precise else 128, next_power_of_two(max_query * group))
    block_m = max(16, next_power_of_two(group), block_m)
    block_n = (32 if precise else 64) // (2 if wide else 1)
    block_q = block_m // group
    _prefill_kernel[(tokens // block_q + batch, kv_heads)](
        *(q, out, key_cache, value_cache, block_tables, cu_query, kv_lens, batch, scale * 1.4426950408889634),
        *(*q.stride()[:2], *out.stride()[:2], block_tables.stride(0)),
        *(*key_cache.stride()[:3], *value_cache.stride()[:3]),
        *(group, size, page, window, next_power_of_two(batch), block_q, block_m, block_n, block_d),
        num_warps=8 if block_m >= 128 or wide else 4,
        num_stages=2 if precise or wide else 3,
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
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over that sequence's cache.

    q [T, H, D], the sequences one after the other; cu_query [B + 1] int32, where each begins and the last ends;
    key_cache, value_cache [N, S, K, D] with the new tokens' own keys and values stored; block_tables [B, M] int32;
    kv_lens [B] int32: the queries of a sequence are the last of its kv_len positions; max_query and max_kv: bounds of
    the two lengths, on the host; window: how many positions a query sees, its own included, 0 for all. Returns [T, H,
    D] in the dtype of q, written to `out` if given. Block table entries and cache contents past kv_len (and before the
    first window) are never used; they may be -1 and NaN. q, out and the caches have adjacent channels. Tokens past
    cu_query[B] are padding, whose output is not defined.
    """
    if use_triton(q):
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(q):
            _launch(q, key_cache, value_cache, block_tables, cu_query, kv_lens, max_query, scale, window, out)
        return out
    result = paged_prefill_reference(q, key_cache, value_cache, block_tables, cu_query, kv_lens, scale, window)
    return result if out is None else out.copy_(result)
