"""Causal attention of long prompts with nothing cached, by cuDNN's kernel that torch ships: on a Hopper some 1.4 times
as fast as ours, which has to look up its blocks.

cuDNN plans each length on the host before it runs it first. So a prompt is cut: its head, a multiple of `UNIT` tokens,
goes here, and its tail to `paged_prefill` like any other piece behind cached tokens; the lengths that may come are few,
and planned at the start.

Shapes: T tokens, H query heads, K KV heads, D head size, N blocks, S block size, L tokens of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kernels.backend import INTERPRETED

UNIT = 512  # tokens
_LEAST = 1024  # below it our kernel is as fast


def heads_of(counts: Iterable[int], lengths: Iterable[int]) -> list[int]:
    """For each sequence of `counts` new tokens, `lengths` in all, how many of the first go to `dense_prefill`."""
    return [
        count // UNIT * UNIT if count == length >= _LEAST else 0 for count, length in zip(counts, lengths, strict=True)
    ]


def lengths_up_to(tokens: int) -> range:
    """What `heads_of` may say in a step of so many tokens, but 0."""
    return range(_LEAST, tokens + 1, UNIT)


def is_supported(device: torch.device, dtype: torch.dtype, head_size: int, window: int) -> bool:
    """Whether `dense_prefill` takes such heads and is worth it."""
    return (
        device.type == "cuda"
        and not INTERPRETED
        and torch.cuda.get_device_capability(device)[0] == 9
        and torch.backends.cudnn.is_available()
        and dtype in (torch.bfloat16, torch.float16)
        and head_size in (64, 128)
        and window == 0
    )


def dense_prefill(
    q: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    slots: torch.Tensor,
    heads: Iterable[tuple[int, int]],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of the tokens [first, first + L) of each of `heads` (first, L) among themselves, written to `out`.

    q, out [T, H, D], v [T, K, D]; the keys are those that `key_cache` [N, S, K, D] has at `slots` [T] int64.
    """
    keys = key_cache.view(-1, *key_cache.shape[2:])
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    for first, length in heads:
        span = slice(first, first + length)
        q_head, k_head, v_head = (
            x.transpose(0, 1).unsqueeze(0) for x in (q[span], keys.index_select(0, slots[span]), v[span])
        )
        found = attend(q_head, k_head, v_head, None, False, 0.0, True, False, scale=scale)
        out[span].copy_(found[0][0].transpose(0, 1))


def plan(heads: int, key_cache: torch.Tensor, tokens: int, scale: float) -> None:
    """Let cuDNN plan all lengths that steps of up to `tokens` tokens may bring, as the model's layers lay them out.

    Raises RuntimeError where it has no kernel for them.
    """
    _, _, kv_heads, size = key_cache.shape
    for length in range(_LEAST, tokens + 1, UNIT):
        qkv = torch.zeros((length, heads + 2 * kv_heads, size), dtype=key_cache.dtype, device=key_cache.device)
        q, slots = qkv[:, :heads].contiguous(), torch.zeros(length, dtype=torch.int64, device=qkv.device)
        dense_prefill(q, qkv[:, heads + kv_heads :], key_cache, slots, [(0, length)], scale, torch.empty_like(q))
