"""Causal attention of long prompts with nothing cached, by cuDNN's kernel that torch ships: on a Hopper some 1.4 times
as fast as ours, which has to look up its blocks.

cuDNN plans each length on the host before it runs it first. So lengths are rounded up to multiples of `UNIT` tokens:
the calls that may come are few, and planned at the start. No token sees what is behind it; rows behind a prompt are
computed in vain, and do no harm as long as their keys and values are finite. Neighbours of one length that is such a
multiple share a call.

Shapes: T tokens, P tokens with padding, H query heads, K KV heads, D head size, N blocks, S block size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from kernels.backend import INTERPRETED

UNIT = 512  # tokens
_LEAST = 1024  # below it our kernel is as fast


class DensePrompts(NamedTuple):
    """Prompts of `length` tokens each, `number` of them beside each other from token `first` on; one call.

    padding: how many of the last tokens are not the prompt's, but what stands behind it.
    """

    first: int
    number: int
    length: int
    padding: int = 0

    @property
    def rows(self) -> int:
        """Of all of them, with padding."""
        return self.number * self.length

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.rows - self.padding


def is_dense(count: int, length: int) -> bool:
    """Whether a sequence of `count` new tokens, `length` in all, goes to `dense_prefill`."""
    return count == length >= _LEAST


def calls_of(prompts: Iterable[tuple[int, int]]) -> tuple[DensePrompts, ...]:
    """Prompts (first, length), ascending, as what runs in one call: a power of two of neighbours of one length."""
    runs: list[DensePrompts] = []
    for first, length in prompts:
        padding = -length % UNIT
        before = runs[-1] if runs and not runs[-1].padding else None
        if before is not None and before.length == length and before.first + before.tokens == first:
            runs[-1] = before._replace(number=before.number + 1)
        else:
            runs.append(DensePrompts(first, 1, length + padding, padding))
    return tuple(call for run in runs for call in _powers(run))


def _powers(run: DensePrompts) -> Iterable[DensePrompts]:
    """`run` cut into powers of two, the greatest first: each number is planned anew."""
    first, left = run.first, run.number
    while left:
        number = 1 << (left.bit_length() - 1)
        yield run._replace(first=first, number=number)
        first, left = first + number * run.length, left - number


def calls_up_to(tokens: int) -> list[DensePrompts]:
    """What may run in a step of so many tokens, wherever it stands, padding apart."""
    lengths = range(_LEAST, tokens + UNIT, UNIT) if tokens >= _LEAST else ()
    return [DensePrompts(0, 1 << i, n) for n in lengths for i in range(max(1, (tokens // n).bit_length()))]


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
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    call: DensePrompts,
    scale: float,
) -> torch.Tensor:
    """Attention of the tokens of each of a call's prompts among themselves; tensors hold these tokens alone.

    q [P, H, D], v [T, K, D] -> [T, H, D], T = call.tokens, P = call.rows; the keys are those that the caches
    [N, S, K, D] have at `slots` [P] int64.
    """
    keys = _at(key_cache, slots)
    # A prompt alone may be padded; the same for each such call, since where the values lie is part of cuDNN's plan.
    values = _at(value_cache, slots) if call.number == 1 else v
    apart = (call.number, call.length)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        *(x.unflatten(0, apart).transpose(1, 2) for x in (q, keys, values)), None, False, 0.0, True, False, scale=scale
    )[0]
    return found.transpose(1, 2).flatten(0, 1)[: call.tokens]


def _at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return cache.view(-1, *cache.shape[2:]).index_select(0, slots)


def plan(heads: int, key_cache: torch.Tensor, tokens: int, scale: float) -> None:
    """Let cuDNN plan all calls that steps of up to `tokens` tokens may bring, as the model's layers lay them out.

    Raises RuntimeError where it has no kernel for them.
    """
    _, _, kv_heads, size = key_cache.shape
    for call in calls_up_to(tokens):
        shape = (call.rows, heads + 2 * kv_heads, size)
        qkv = torch.zeros(shape, dtype=key_cache.dtype, device=key_cache.device)
        q, slots = qkv[:, :heads].contiguous(), torch.zeros(call.rows, dtype=torch.int64, device=qkv.device)
        dense_prefill(q, qkv[:, heads + kv_heads :], key_cache, key_cache, slots, call, scale)
