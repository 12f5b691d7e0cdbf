"""Rotary position embedding, alone and fused with the write of keys and values to the paged cache.

Shapes: T tokens, H query heads, K KV heads, D head size, R rotary size (R <= D), P positions, N blocks, S block size.
Source: Su et al., RoFormer, 2021; halves are rotated against each other (NeoX, llama), not neighbours.
"""

from __future__ import annotations

import torch

from kernels.kv_cache import store_kv_reference


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotary_embed_reference(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary_embed` in torch."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rotary_and_store_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """`rotary_and_store` in torch."""
    q, k = rotary_embed_reference(q, k, positions, cos_sin)
    store_kv_reference(k, v, key_cache, value_cache, slots)
    return q


def rotary_embed(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions.

    q [T, H, D], k [T, K, D]; positions [T] int32 or int64; cos_sin [P, R] fp32, cosines in the first half of a row and
    sines in the second. Returns new tensors of the shapes and dtypes of q and k. The rotation is done in fp32; channels
    from R on are copied.
    """
    return rotary_embed_reference(q, k, positions, cos_sin)


def rotary_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k, write the rotated keys and the values to the cache, and return the rotated queries [T, H, D].

    Arguments as in `rotary_embed` and `kernels.kv_cache.store_kv`. The rotated keys exist in the cache only; a token
    with a negative slot has its query rotated and nothing stored.
    """
    return rotary_and_store_reference(q, k, v, positions, cos_sin, key_cache, value_cache, slots)
