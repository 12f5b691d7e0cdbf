"""Rotary position embedding, alone and fused with the write of keys and values to the paged cache.

Shapes: T tokens, H query heads, K KV heads, D head size, R rotary size (R <= D), P positions, N blocks, S block size.
Source: Su et al., RoFormer, 2021. Halves are rotated against each other (NeoX, llama), or neighbours where interleaved
(GPT-J, GLM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.backend import begin, constexpr, early_start, next_power_of_two, tensor, tl, triton_jit, use_triton
from kernels.kv_cache import Memo, store_kv_reference


def _factors(positions: torch.Tensor, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors [T, 1, R] of `_rotate`."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]
    first, second = x[..., :size].float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., : size // 2], sin[..., size // 2 :]
    out = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:]], dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]
    x32 = x[..., :size].float()
    out = torch.mul(x32, cos).addcmul_(x32.roll(size // 2, dims=-1), sin).to(x.dtype)
    return out if size == x.shape[-1] else torch.cat([out, x[..., size:]], dim=-1)


def _rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rotate = _rotate_neighbours if interleaved else _rotate
    (tokens, heads, size), kv_heads = q.shape, k.shape[1]
    beside = (
        (tokens == 1 or q.stride(0) == k.stride(0))  # of one token the stride may be anything
        and q.stride()[1:] == k.stride()[1:] == (size, 1)
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and k.storage_offset() == q.storage_offset() + heads * size
    )
    if not beside:
        return rotate(q, cos, sin), rotate(k, cos, sin)
    # Parts of one projection are rotated as one: at small batches the number of operations is what counts.
    both = rotate(q.as_strided((tokens, heads + kv_heads, size), q.stride()), cos, sin)
    return both[:, :heads], both[:, heads:]


def rotary_embed_reference(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary_embed` in torch."""
    return _rotate_both(q, k, *_factors(positions, cos_sin), interleaved=interleaved)


def rotary_and_store_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    memo: Memo | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """`rotary_and_store` in torch."""
    memo = {} if memo is None else memo
    key = "factors", cos_sin.data_ptr()
    if key not in memo:
        memo[key] = _factors(positions, cos_sin)
    q, k = _rotate_both(q, k, *memo[key], interleaved=interleaved)
    store_kv_reference(k, v, key_cache, value_cache, slots, memo)
    return q


@triton_jit
def _rotate_tile(
    x_ptr: tensor,
    x_head: tensor,
    out_ptr: tensor,
    out_head: tensor,
    cos: tensor,
    sin: tensor,
    head: tensor,
    heads: tensor,
    SIZE: constexpr,
    HALF: constexpr,
    BLOCK_R: constexpr,
    BLOCK_D: constexpr,
    INTERLEAVED: constexpr,
) -> None:
    """Rotate the heads `head` [BLOCK_H] of one token; the pointers are at the token."""
    channel = tl.arange(0, BLOCK_R)[None, :]
    real = (head < heads)[:, None] & (channel < HALF)
    if INTERLEAVED:
        at = 2 * channel
        beside = 1
    else:
        at = channel
        beside = HALF
    x_at = x_ptr + head[:, None] * x_head + at
    out_at = out_ptr + head[:, None] * out_head + at
    first = tl.load(x_at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x_at + beside, mask=real, other=0.0).to(tl.float32)
    tl.store(out_at, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=real)
    tl.store(out_at + beside, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=real)
    if 2 * HALF < SIZE:
        rest = tl.arange(0, BLOCK_D)[None, :]
        real = (head < heads)[:, None] & (rest >= 2 * HALF) & (rest < SIZE)
        x = tl.load(x_ptr + head[:, None] * x_head + rest, mask=real)
        tl.store(out_ptr + head[:, None] * out_head + rest, x.to(out_ptr.dtype.element_ty), mask=real)


@triton_jit
def _rotary_kernel(
    q_ptr: tensor,
    k_ptr: tensor,
    v_ptr: tensor,
    q_out_ptr: tensor,
    k_out_ptr: tensor,
    v_out_ptr: tensor,
    position_ptr: tensor,
    slot_ptr: tensor,
    cos_sin_ptr: tensor,
    q_token: tensor,
    q_head: tensor,
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
    KV_HEADS: constexpr,
    SIZE: constexpr,
    HALF: constexpr,
    PAGE: constexpr,
    BLOCK_H: constexpr,
    BLOCK_R: constexpr,
    BLOCK_D: constexpr,
    STORE: constexpr,
    INTERLEAVED: constexpr,
    EARLY: constexpr,
) -> None:
    """Some heads of one token a program: first those of q, then those of k with their v.

    With STORE, k_out and v_out are the caches; without, k_out is [T, K, D] and v is not looked at.
    """
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles = tl.cdiv(HEADS, BLOCK_H)
    channel = tl.arange(0, BLOCK_R)
    row = cos_sin_ptr + tl.load(position_ptr + token).to(tl.int64) * (2 * HALF) + channel
    cos = tl.load(row, mask=channel < HALF, other=0.0)[None, :]
    sin = tl.load(row + HALF, mask=channel < HALF, other=0.0)[None, :]
    if tile < q_tiles:
        head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        out = q_out_ptr + token * HEADS * SIZE
        _rotate_tile(
            q_ptr + token * q_token, q_head, out, SIZE, cos, sin, head, HEADS, SIZE, HALF, BLOCK_R, BLOCK_D,
            INTERLEAVED,
        )  # fmt: skip
    else:
        head = (tile - q_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        k_at = k_ptr + token * k_token
        if STORE:
            slot = tl.load(slot_ptr + token).to(tl.int64)
            if slot >= 0:
                out = k_out_ptr + slot // PAGE * key_block + slot % PAGE * key_slot
                _rotate_tile(
                    k_at, k_head, out, key_head, cos, sin, head, KV_HEADS, SIZE, HALF, BLOCK_R, BLOCK_D, INTERLEAVED
                )
                whole = tl.arange(0, BLOCK_D)[None, :]
                real = (head < KV_HEADS)[:, None] & (whole < SIZE)
                v = tl.load(v_ptr + token * v_token + head[:, None] * v_head + whole, mask=real)
                v_at = v_out_ptr + slot // PAGE * value_block + slot % PAGE * value_slot
                v_at += head[:, None] * value_head + whole
                tl.store(v_at, v.to(v_out_ptr.dtype.element_ty), mask=real)
        else:
            out = k_out_ptr + token * KV_HEADS * SIZE
            _rotate_tile(k_at, k_head, out, SIZE, cos, sin, head, KV_HEADS, SIZE, HALF, BLOCK_R, BLOCK_D, INTERLEAVED)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    slots: torch.Tensor,
    store: bool,
    interleaved: bool,
    padding: int = 0,
) -> torch.Tensor:
    tokens, heads, size = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    q_out = torch.empty((tokens + padding, heads, size), dtype=q.dtype, device=q.device)
    if padding:
        q_out[tokens:].zero_()
    if tokens:
        block = min(8, next_power_of_two(heads))
        grid = (tokens, -(-heads // block) - (-kv_heads // block))
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        caches = (*k_out.stride()[:3], *v_out.stride()[:3]) if store else (0,) * 6
        page = k_out.shape[1] if store else 1
        blocks = (block, next_power_of_two(half), next_power_of_two(size), store, interleaved)
        _rotary_kernel[grid](
            *(q, k, v, q_out, k_out, v_out, positions, slots, cos_sin),
            *strides,
            *caches,
            *(heads, kv_heads, size, half, page),
            *blocks,
            num_warps=2,
            **early_start(q),
        )
    return q_out


def rotary_embed(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions.

    q [T, H, D], k [T, K, D], channels adjacent; positions [T] int32 or int64; cos_sin [P, R] fp32, cosines in the first
    half of a row and sines in the second. Returns new tensors of the shapes and dtypes of q and k. The rotation is done
    in fp32; channels from R on are copied. Channel i < R / 2 turns with channel i + R / 2, or, if interleaved, channel
    2 i with 2 i + 1.
    """
    if use_triton(q):
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        return _launch(q, k, k, positions, cos_sin, k_out, k_out, positions, False, interleaved), k_out
    return rotary_embed_reference(q, k, positions, cos_sin, interleaved)


def rotary_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    memo: Memo | None = None,
    interleaved: bool = False,
    padding: int = 0,
) -> torch.Tensor:
    """Rotate q and k, write the rotated keys and the values to the cache, and return the rotated queries [T, H, D].

    Arguments as in `rotary_embed` and `kernels.kv_cache.store_kv`. The rotated keys exist in the cache only; a token
    with a negative slot has its query rotated and nothing stored. memo: a dict kept for the layers of a step, which
    have the same positions and slots; the reference looks these up once. padding: rows of zeros to return behind the
    queries, as `dense_prefill` may need.
    """
    if use_triton(q):
        return _launch(q, k, v, positions, cos_sin, key_cache, value_cache, slots, True, interleaved, padding)
    q = rotary_and_store_reference(q, k, v, positions, cos_sin, key_cache, value_cache, slots, memo, interleaved)
    return F.pad(q, (0, 0, 0, 0, 0, padding)) if padding else q
