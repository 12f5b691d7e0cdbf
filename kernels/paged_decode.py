"""Attention of one query token a sequence over the paged cache.

Shapes: B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a sequence,
L gathered positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def paged_decode_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """`paged_decode` in torch: gather what is seen, then one dense attention for the whole batch."""
    batch, heads, size = q.shape
    blocks, block_size, kv_heads, _ = key_cache.shape
    span = max(1, min(max_kv, window) if window else max_kv)
    lens = kv_lens.long()
    first = (lens - span).clamp_(min=0).unsqueeze(1)
    last = (lens - 1).clamp_(min=0).unsqueeze(1)
    position = first + torch.arange(span, device=q.device)
    seen = position <= last
    # What is not seen may be NaN, which no mask removes; a position that is seen stands in for it.
    position = torch.minimum(position, last)
    slot = block_tables.long().gather(1, position // block_size) * block_size + position % block_size
    slot = slot.clamp_(min=0).flatten()
    keys, values = (
        cache.view(blocks * block_size, -1)
        .index_select(0, slot)
        .view(batch, span, kv_heads, size)
        .transpose(1, 2)
        .to(q.dtype)
        for cache in (key_cache, value_cache)
    )
    # The heads of a group are the rows of one small matrix, so no key is repeated.
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, size)
    mask = seen[:, None, None, :].expand(batch, 1, heads // kv_heads, span)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).reshape(q.shape)
    return torch.where((lens > 0)[:, None, None], out, 0.0)


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
) -> torch.Tensor:
    """Attention of the query at position kv_len - 1 of each sequence over that sequence's cache.

    q [B, H, D]; key_cache, value_cache [N, S, K, D] with the new token's own key and value stored; block_tables
    [B, M] int32; kv_lens [B] int32, 0 for a padding row, whose output is zeros; max_kv >= every kv_len, on the host;
    window: how many positions are seen, the query's own included, 0 for all. Returns [B, H, D] in the dtype of q,
    written to `out` if given. Block table entries and cache contents past kv_len (and before the window) are never
    used; they may be -1 and NaN.
    """
    result = paged_decode_reference(q, key_cache, value_cache, block_tables, kv_lens, max_kv, scale, window)
    return result if out is None else out.copy_(result)
