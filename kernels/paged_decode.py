"""Attention of one query token a sequence over the paged cache.

Shapes: B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, M blocks a sequence.
"""

from __future__ import annotations

import torch

from kernels.paged_prefill import paged_prefill_reference


def paged_decode_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """`paged_decode` in torch: a prefill of one token each; on CUDA it waits for the device."""
    cu_query = torch.arange(len(q) + 1, device=q.device)
    return paged_prefill_reference(q, key_cache, value_cache, block_tables, cu_query, kv_lens, scale, window)


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
    result = paged_decode_reference(q, key_cache, value_cache, block_tables, kv_lens, scale, window)
    return result if out is None else out.copy_(result)
