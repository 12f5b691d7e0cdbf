"""Attention as one opaque op: it takes q, k and v, and finds all else in the forward context by layer index.

torch.compile and CUDA graphs see `echelon::attention` and nothing of batching. Rotation and the write to the cache are
part of it, since one kernel does both.

Shapes: T tokens, H query heads, K KV heads, D head size, P positions, R rotary size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from kernels import invariant_attention
from kernels.attention_tile import PLAIN, ScoreOptions
from kernels.dense_prefill import dense_prefill, is_supported, plan
from kernels.kv_cache import store_kv
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import launches_of, paged_prefill
from kernels.rotary import rotary_and_store
from workers import context
from workers.layers.build import Build, divide
from workers.layers.rotary import RotaryEmbedding
from workers.quant.method import Part, Span

# A registration of the plain kind: the decorators of torch.library check and wrap every call, some 10 us each.
_library = torch.library.Library("echelon", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? positions, Tensor? cos_sin, int layer_index, float scale, "
    "int window, bool interleaved=False, float soft_cap=0.0, Tensor? slopes=None, Tensor? sinks=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _decode(
    q: torch.Tensor,
    batch: context.AttentionMetadata,
    cache: context.LayerCache,
    scale: float,
    window: int,
    options: ScoreOptions,
    out: torch.Tensor | None,
) -> torch.Tensor:
    decode = batch.decode
    assert decode is not None
    return paged_decode(
        q, cache.key, cache.value, decode.block_tables, decode.kv_lens, decode.max_kv, scale, window,
        out=out, memo=decode.memo, rows=decode.rows, options=options,
    )  # fmt: skip


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    layer_index: int,
    scale: float,
    window: int,
    interleaved: bool = False,
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    plain = not soft_cap and slopes is None and sinks is None
    options = PLAIN if plain else ScoreOptions(soft_cap, slopes, sinks)
    current = context.current()
    batch, cache = current.attention[layer_index], current.caches[layer_index]
    prefill, tokens = batch.prefill, q.shape[0]
    dense_slots = None if prefill is None else prefill.dense_slots
    padding = 0 if dense_slots is None else dense_slots.shape[0] - tokens
    if positions is None or cos_sin is None:
        store_kv(k, v, cache.key, cache.value, batch.slots, batch.memo)
        # A copy, also since an op must not return its input.
        q = F.pad(q, (0, 0, 0, 0, 0, padding)) if padding else q.contiguous()
    else:
        q = rotary_and_store(
            q, k, v, positions, cos_sin, cache.key, cache.value, batch.slots, batch.memo, interleaved, padding
        )
    if batch.batch_invariant:
        return _attend_invariantly(q, batch, cache, scale, window, options)
    if prefill is None:
        return _decode(q, batch, cache, scale, window, options, None)
    if dense_slots is not None and batch.decode is None and not prefill.rest and len(prefill.dense) == 1:
        return dense_prefill(q, v, cache.key, cache.value, dense_slots, prefill.dense[0], scale)
    out = torch.empty_like(q[:tokens])
    first, decodes = prefill.first, batch.num_decodes
    if batch.decode is not None:  # before the others: rows of padding are zeros, which these then replace
        _decode(q[:decodes], batch, cache, scale, window, options, out[:decodes])
    if prefill.rest:  # before the dense prompts, of which it makes zeros
        paged_prefill(
            q[first:tokens], cache.key, cache.value, prefill.block_tables, prefill.cu_query, prefill.kv_lens,
            prefill.max_query, prefill.max_kv, scale, window, out=out[first:], memo=prefill.memo, options=options,
        )  # fmt: skip
    for call in prefill.dense:
        assert dense_slots is not None
        at = first + call.first
        real, rows = slice(at, at + call.tokens), slice(at, at + call.rows)
        out[real] = dense_prefill(q[rows], v[real], cache.key, cache.value, dense_slots[rows], call, scale)
    return out


def _attend_invariantly(
    q: torch.Tensor,
    batch: context.AttentionMetadata,
    cache: context.LayerCache,
    scale: float,
    window: int,
    options: ScoreOptions,
) -> torch.Tensor:
    """One kernel for decodes and prompts: no token's result depends on the others."""
    attend, decode, prefill = invariant_attention.invariant_attention, batch.decode, batch.prefill
    out = torch.empty_like(q)
    if decode is not None:  # before the others, see below
        span = slice(batch.num_decodes)
        attend(
            q[span], cache.key, cache.value, decode.block_tables, None, decode.kv_lens, 1, decode.max_kv, scale, window,
            out=out[span], rows=decode.rows, options=options,
        )  # fmt: skip
    if prefill is not None:
        assert not prefill.dense, "dense prompts go to cuDNN, which is not batch-invariant"
        span = slice(prefill.first, None)
        attend(
            q[span], cache.key, cache.value, prefill.block_tables, prefill.cu_query, prefill.kv_lens, prefill.max_query,
            prefill.max_kv, scale, window, out=out[span], options=options,
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
    interleaved: bool = False,
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_library.impl("attention", _attention, "CPU")
_library.impl("attention", _attention, "CUDA")
_library.impl("attention", _attention_shape, "Meta")
_op = torch.ops.echelon.attention.default


class Sinks(nn.Module):
    """One score a head that takes part in the softmax and has no value; this rank's heads, kept in fp32."""

    def __init__(self, heads: int, *, build: Build) -> None:
        super().__init__()
        tp = build.groups.tp
        count = divide(heads, tp.size, "number of attention sinks")
        self._span = Span(heads, tp.rank * count, count)
        zeros = torch.zeros(count, dtype=torch.float32, device=build.device)
        self.sinks = nn.Parameter(zeros, requires_grad=False)

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        return {"": Part.of(self._span)}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        self.sinks.copy_(tensor)

    def finish(self) -> None:
        """See `Loadable`."""


def alibi_slopes(heads: int, *, build: Build) -> torch.Tensor:
    """The slopes of this rank's heads, fp32: geometric, for other counts than powers of two with those between.

    Source: Press et al., Train Short, Test Long, 2021.
    """
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]
    tp = build.groups.tp
    count = divide(heads, tp.size, "number of heads with ALiBi")
    return torch.tensor(slopes[tp.rank * count : (tp.rank + 1) * count], device=build.device)


class Attention(nn.Module):
    """Causal attention of one layer over the paged cache. Counts of heads are this rank's.

    soft_cap, slopes and sinks: see `kernels.attention_tile.ScoreOptions`.
    """

    slopes: torch.Tensor | None

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
        soft_cap: float = 0.0,
        slopes: torch.Tensor | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        super().__init__()
        self.layer_index, self.scale, self.window = layer_index, scale, window
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.rotary, self.soft_cap = rotary, soft_cap
        self.interleaved = rotary is not None and rotary.interleaved
        self.register_buffer("slopes", slopes, persistent=False)
        self._sinks = (sinks,)  # not a module of this one: its name is that of its owner's

    @property
    def options(self) -> ScoreOptions:
        """What is done to the scores."""
        (sinks,) = self._sinks
        return ScoreOptions(self.soft_cap, self.slopes, None if sinks is None else sinks.sinks)

    @property
    def kernel_key(self) -> tuple[object, ...]:
        """Equal for layers that launch the same kernels."""
        options = self.options
        heads = (self.num_heads, self.num_kv_heads, self.head_size, self.window)
        return (*heads, options.soft_cap, options.slopes is None, options.sinks is None)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q [T, H * D], k and v [T, K * D], not yet rotated; positions [T] int64 -> [T, H * D].

        Needs a forward context with this layer's metadata and cache.
        """
        tokens, size, rotary = q.shape[0], self.head_size, self.rotary
        cos_sin = None if rotary is None else rotary.cos_sin
        if rotary is not None and rotary.by_length and positions is not None:
            positions, cos_sin = rotary.of_step(positions, context.current().attention[self.layer_index])
        (sinks,) = self._sinks
        out = _op(
            q.view(tokens, self.num_heads, size),
            k.view(tokens, self.num_kv_heads, size),
            v.view(tokens, self.num_kv_heads, size),
            positions,
            cos_sin,
            self.layer_index,
            self.scale,
            self.window,
            self.interleaved,
            self.soft_cap,
            self.slopes,
            None if sinks is None else sinks.sinks,
        )
        return out.view(tokens, self.num_heads * size)

    def launches(
        self, cache: context.LayerCache, tokens: int, sequences: int, *, batch_invariant: bool = False
    ) -> list[Callable[[], None]]:
        """All kernels that long steps of up to `tokens` tokens of up to `sequences` sequences may launch: to be called
        once each, in any thread. Layers of one shape have the same.
        """
        q = torch.empty((1, self.num_heads, self.head_size), dtype=cache.key.dtype, device=cache.key.device)
        find = invariant_attention.launches_of if batch_invariant else launches_of
        return find(q, cache.key, cache.value, tokens, sequences, self.window, self.options)

    def plan_long_prompts(self, cache: context.LayerCache, tokens: int) -> bool:
        """Whether `dense_prefill` takes this layer's prompts; all lengths in steps of up to `tokens` are planned then.

        Raises RuntimeError where the library has no kernel after all.
        """
        if not self.options.is_plain or not is_supported(
            cache.key.device, cache.key.dtype, self.head_size, self.window
        ):
            return False
        plan(self.num_heads, cache.key, tokens, self.scale)
        return True
