"""Attention as one opaque op: it takes q, k and v, and finds all else in the forward context by layer index.

torch.compile and CUDA graphs see `echelon::attention` and nothing of batching. Rotation and the write to the cache are
part of it, since one kernel does both.

Shapes: T tokens, H query heads, K KV heads, D head size, P positions, R rotary size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kernels.dense_prefill import dense_prefill, is_supported, plan
from kernels.kv_cache import store_kv
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import launches_of, paged_prefill
from kernels.rotary import rotary_and_store
from workers import context
from workers.layers.rotary import RotaryEmbedding

# A registration of the plain kind: the decorators of torch.library check and wrap every call, some 10 us each.
_library = torch.library.Library("echelon", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? positions, Tensor? cos_sin, int layer_index, float scale, "
    "int window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    layer_index: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    current = context.current()
    batch, cache = current.attention[layer_index], current.caches[layer_index]
    if positions is None or cos_sin is None:
        store_kv(k, v, cache.key, cache.value, batch.slots, batch.memo)
        q = q.contiguous()  # also: an op must not return its input
    else:
        q = rotary_and_store(q, k, v, positions, cos_sin, cache.key, cache.value, batch.slots, batch.memo)
    decode, prefill, decodes = batch.decode, batch.prefill, batch.num_decodes
    if prefill is None:
        assert decode is not None
        return paged_decode(
            q, cache.key, cache.value, decode.block_tables, decode.kv_lens, decode.max_kv, scale, window,
            memo=decode.memo, rows=decode.rows,
        )  # fmt: skip
    if decode is None and not prefill.rest and len(prefill.heads) == 1:
        return dense_prefill(q, v, cache.key, batch.slots, prefill.heads[0], scale)
    out = torch.empty_like(q)
    if decode is not None:  # before the others: rows of padding are zeros, which these then replace
        paged_decode(
            q[:decodes], cache.key, cache.value, decode.block_tables, decode.kv_lens, decode.max_kv, scale, window,
            out=out[:decodes], memo=decode.memo, rows=decode.rows,
        )  # fmt: skip
    first = prefill.first
    for heads in prefill.heads:
        span = slice(first + heads.first, first + heads.first + heads.tokens)
        out[span] = dense_prefill(q[span], v[span], cache.key, batch.slots[span], heads, scale)
    if prefill.rest:
        paged_prefill(
            q[first:], cache.key, cache.value, prefill.block_tables, prefill.cu_query, prefill.kv_lens,
            prefill.max_query, prefill.max_kv, scale, window, out=out[first:], memo=prefill.memo,
        )  # fmt: skip
    return out


def _attention_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    layer_index: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_library.impl("attention", _attention, "CPU")
_library.impl("attention", _attention, "CUDA")
_library.impl("attention", _attention_shape, "Meta")
_op = torch.ops.echelon.attention.default


class Attention(nn.Module):
    """Causal attention of one layer over the paged cache. Counts of heads are this rank's."""

    def __init__(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        scale: float,
        window: int = 0,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.layer_index, self.scale, self.window = layer_index, scale, window
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.rotary = rotary

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q [T, H * D], k and v [T, K * D], not yet rotated; positions [T] int64 -> [T, H * D].

        Needs a forward context with this layer's metadata and cache.
        """
        tokens, size = q.shape[0], self.head_size
        out = _op(
            q.view(tokens, self.num_heads, size),
            k.view(tokens, self.num_kv_heads, size),
            v.view(tokens, self.num_kv_heads, size),
            positions,
            None if self.rotary is None else self.rotary.cos_sin,
            self.layer_index,
            self.scale,
            self.window,
        )
        return out.view(tokens, self.num_heads * size)

    def launches(self, cache: context.LayerCache, tokens: int, sequences: int) -> list[Callable[[], None]]:
        """All kernels that long steps of up to `tokens` tokens of up to `sequences` sequences may launch: to be called
        once each, in any thread. Layers of one shape have the same.
        """
        q = torch.empty((1, self.num_heads, self.head_size), dtype=cache.key.dtype, device=cache.key.device)
        return launches_of(q, cache.key, cache.value, tokens, sequences, self.window)

    def plan_long_prompts(self, cache: context.LayerCache, tokens: int) -> bool:
        """Whether `dense_prefill` takes this layer's prompts; all lengths in steps of up to `tokens` are planned then.

        Raises RuntimeError where the library has no kernel after all.
        """
        if not is_supported(cache.key.device, cache.key.dtype, self.head_size, self.window):
            return False
        plan(self.num_heads, cache.key, tokens, self.scale)
        return True
