"""Writing new keys and values into the paged cache.

Shapes: T tokens, K KV heads, D head size, N blocks, S block size. A slot is block * S + offset in the block.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from kernels.backend import constexpr, next_power_of_two, tensor, tl, triton_jit, use_triton

# What depends on the step alone and not on the layer, kept by the references for the step's other layers.
Memo: TypeAlias = dict[Any, Any]


def store_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    memo: Memo | None = None,
) -> None:
    """`store_kv` in torch; on CUDA it waits for the device."""
    memo = {} if memo is None else memo
    if "kept" not in memo:
        some = slots.numel() > 0 and int(slots.min()) < 0
        memo["kept"] = (slots >= 0).nonzero().flatten() if some else None
    kept = memo["kept"]
    if kept is not None:
        k, v, slots = k[kept], v[kept], slots[kept]
    for new, cache in ((k, key_cache), (v, value_cache)):
        # view, not reshape: a copy would swallow the write.
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new.to(cache.dtype))


@triton_jit
def _store_kernel(
    k_ptr: tensor,
    v_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    slot_ptr: tensor,
    k_token: tensor,
    k_head: tensor,
    v_token: tensor,
    v_head: tensor,
    key_block: tensor,
    key_slot: tensor,
    key_head: tensor,
    value_block: tensor,
    value_slot: tensor,
    value_head: tensor,
    HEADS: constexpr,
    SIZE: constexpr,
    PAGE: constexpr,
    BLOCK: constexpr,
) -> None:
    """All heads of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    element = tl.arange(0, BLOCK)
    head, channel = element // SIZE, element % SIZE
    real = element < HEADS * SIZE
    k = tl.load(k_ptr + token * k_token + head * k_head + channel, mask=real)
    v = tl.load(v_ptr + token * v_token + head * v_head + channel, mask=real)
    page, offset = slot // PAGE, slot % PAGE
    key_at = key_ptr + page * key_block + offset * key_slot + head * key_head + channel
    value_at = value_ptr + page * value_block + offset * value_slot + head * value_head + channel
    tl.store(key_at, k.to(key_ptr.dtype.element_ty), mask=real)
    tl.store(value_at, v.to(value_ptr.dtype.element_ty), mask=real)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    memo: Memo | None = None,
) -> None:
    """Write the keys and values of T tokens to their slots of the cache, in place.

    k, v [T, K, D]; key_cache, value_cache [N, S, K, D], channels adjacent in all four; slots [T] int64. A token with a
    negative slot is skipped; two tokens must not share a slot. memo: a dict kept for the layers of a step, which have
    the same slots.
    """
    if use_triton(k):
        tokens, heads, size = k.shape
        if tokens:
            strides = (*k.stride()[:2], *v.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3])
            shape = (heads, size, key_cache.shape[1], next_power_of_two(heads * size))
            _store_kernel[(tokens,)](k, v, key_cache, value_cache, slots, *strides, *shape, num_warps=4)
        return
    store_kv_reference(k, v, key_cache, value_cache, slots, memo)
