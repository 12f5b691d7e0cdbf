"""Causal attention of variable numbers of query tokens over the paged cache.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a
sequence, Q queries and L positions of a bucket.
"""

from __future__ import annotations

from collections import defaultdict

import torch

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
    the two lengths, on the host; window: how many positions a query sees, its own included, 0 for all. Returns
    [T, H, D] in the dtype of q, written to `out` if given. Block table entries and cache contents past kv_len (and
    before the first window) are never used; they may be -1 and NaN.
    """
    result = paged_prefill_reference(q, key_cache, value_cache, block_tables, cu_query, kv_lens, scale, window)
    return result if out is None else out.copy_(result)
