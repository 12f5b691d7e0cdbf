"""Writing new keys and values into the paged cache.

Shapes: T tokens, K KV heads, D head size, N blocks, S block size. A slot is block * S + offset in the block.
"""

from __future__ import annotations

import torch


def store_kv_reference(
    k: torch.Tensor, v: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """`store_kv` in torch; on CUDA it waits for the device."""
    blocks, size = key_cache.shape[:2]
    if slots.numel() and int(slots.min()) < 0:
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    for new, cache in ((k, key_cache), (v, value_cache)):
        # view, not reshape: a copy would swallow the write.
        cache.view(blocks * size, *cache.shape[2:])[slots] = new.to(cache.dtype)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of T tokens to their slots of the cache, in place.

    k, v [T, K, D]; key_cache, value_cache [N, S, K, D]; slots [T] int64. A token with a negative slot is skipped; two
    tokens must not share a slot.
    """
    store_kv_reference(k, v, key_cache, value_cache, slots)
