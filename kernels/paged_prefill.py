"""Causal attention of variable numbers of query tokens over the paged cache.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a
sequence, Q queries and L positions of a bucket.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F


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
    """`paged_prefill` in torch; on CUDA it waits for the device.

    Sequences of like lengths share one dense attention: a batch of many decodes and few prompts costs a handful of
    calls and less than four times the arithmetic, however it is mixed.
    """
    starts, lens = cu_query.tolist(), kv_lens.tolist()
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for b, kv_len in enumerate(lens):
        if starts[b + 1] > starts[b]:
            buckets[(starts[b + 1] - starts[b] - 1).bit_length(), (kv_len - 1).bit_length()].append(b)
    out = q.new_zeros(q.shape)
    for rows in buckets.values():
        queries = max(starts[b + 1] - starts[b] for b in rows)
        index = torch.tensor(rows, device=q.device)
        _attend(q, key_cache, value_cache, block_tables, cu_query, kv_lens, index, queries, max(lens[b] for b in rows),
                scale, window, out)  # fmt: skip
    return out


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor,
    kv_lens: torch.Tensor,
    rows: torch.Tensor,
    queries: int,
    span: int,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Attend for the sequences `rows`, padded to `queries` x `span`, and scatter into `out`."""
    blocks, block_size, kv_heads, size = key_cache.shape
    group = q.shape[1] // kv_heads
    start = cu_query[rows].long().unsqueeze(1)
    count = cu_query[rows + 1].long().unsqueeze(1) - start
    length = kv_lens[rows].long().unsqueeze(1)
    step = torch.arange(queries, device=q.device)
    real = step < count
    token = start + torch.minimum(step, count - 1)
    query_at = length - count + torch.minimum(step, count - 1)
    position = torch.arange(span, device=q.device).expand(len(rows), span)
    lowest = (length - count - window + 1).clamp_(min=0) if window else torch.zeros_like(length)
    # What is not seen may be NaN, which no mask removes; a position that is seen stands in for it.
    safe = torch.minimum(torch.maximum(position, lowest), length - 1)
    slot = block_tables[rows].long().gather(1, safe // block_size) * block_size + safe % block_size
    slot = slot.flatten()
    keys, values = (
        cache.view(blocks * block_size, -1)
        .index_select(0, slot)
        .view(len(rows), span, kv_heads, size)
        .transpose(1, 2)
        .to(q.dtype)
        for cache in (key_cache, value_cache)
    )
    seen = position[:, None, :] <= query_at[:, :, None]
    if window:
        seen &= position[:, None, :] > query_at[:, :, None] - window
    # The heads of a group are rows beside each other, so no key is repeated.
    mask = seen.repeat_interleave(group, dim=1).unsqueeze(1)
    grouped = q[token].view(len(rows), queries, kv_heads, group, size).transpose(1, 2)
    grouped = grouped.reshape(len(rows), kv_heads, queries * group, size)
    result = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    result = result.view(len(rows), kv_heads, queries, group, size).transpose(1, 2)
    out[token[real]] = result.reshape(len(rows), queries, kv_heads * group, size)[real]


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
