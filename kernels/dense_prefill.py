"""Causal attention of long prompts with nothing cached, by cuDNN's kernel that torch ships: on a Hopper some 1.4 times
as fast as ours, which has to look up its blocks.

cuDNN plans each length on the host before it runs it first. So a prompt is cut: its head, a multiple of `UNIT` tokens,
goes here, and its tail to `paged_prefill` like any other piece behind cached tokens; the calls that may come are few,
and planned at the start. Neighbours of one length share a call.

Shapes: T tokens, H query heads, K KV heads, D head size, N blocks, S block size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from kernels.backend import INTERPRETED

UNIT = 512  # tokens
_LEAST = 1024  # below it our kernel is as fast


class Heads(NamedTuple):
    """Heads of `length` tokens each, `number` of them beside each other from token `first` on."""

    first: int
    number: int
    length: int

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.number * self.length


def heads_of(counts: Iterable[int], lengths: Iterable[int]) -> list[int]:
    """For each sequence of `counts` new tokens, `lengths` in all, how many of the first go to `dense_prefill`."""
    return [
        count // UNIT * UNIT if count == length >= _LEAST else 0 for count, length in zip(counts, lengths, strict=True)
    ]


def adjoining(heads: Iterable[tuple[int, int]]) -> tuple[Heads, ...]:
    """Heads (first, length), ascending, as what runs in one call: neighbours of one length, a power of two of them."""
    runs: list[Heads] = []
    for first, length in heads:
        if runs and runs[-1].length == length and runs[-1].first + runs[-1].tokens == first:
            runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
        else:
            runs.append(Heads(first, 1, length))
    return tuple(call for run in runs for call in _powers(run))


def _powers(run: Heads) -> Iterable[Heads]:
    """`run` cut into powers of two, the greatest first: each number is planned anew."""
    first, left = run.first, run.number
    while left:
        number = 1 << (left.bit_length() - 1)
        yield Heads(first, number, run.length)
        first, left = first + number * run.length, left - number


def calls_up_to(tokens: int) -> list[Heads]:
    """What may run in a step of so many tokens, wherever it stands."""
    lengths = range(_LEAST, tokens + 1, UNIT)
    return [Heads(0, 1 << i, n) for n in lengths for i in range((tokens // n).bit_length())]


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
    q: torch.Tensor, v: torch.Tensor, key_cache: torch.Tensor, slots: torch.Tensor, heads: Heads, scale: float
) -> torch.Tensor:
    """Attention of the tokens of each of `heads` among themselves; tensors hold these tokens alone.

    q [T, H, D], v [T, K, D] -> [T, H, D], T = heads.tokens; the keys are those that `key_cache` [N, S, K, D] has at
    `slots` [T] int64.
    """
    keys = key_cache.view(-1, *key_cache.shape[2:]).index_select(0, slots)
    apart = (heads.number, heads.length)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        *(x.unflatten(0, apart).transpose(1, 2) for x in (q, keys, v)), None, False, 0.0, True, False, scale=scale
    )[0]
    return found.transpose(1, 2).flatten(0, 1)


def plan(heads: int, key_cache: torch.Tensor, tokens: int, scale: float) -> None:
    """Let cuDNN plan all calls that steps of up to `tokens` tokens may bring, as the model's layers lay them out.

    Raises RuntimeError where it has no kernel for them.
    """
    _, _, kv_heads, size = key_cache.shape
    for call in calls_up_to(tokens):
        shape = (call.tokens, heads + 2 * kv_heads, size)
        qkv = torch.zeros(shape, dtype=key_cache.dtype, device=key_cache.device)
        q, slots = qkv[:, :heads].contiguous(), torch.zeros(call.tokens, dtype=torch.int64, device=qkv.device)
        dense_prefill(q, qkv[:, heads + kv_heads :], key_cache, slots, call, scale)
