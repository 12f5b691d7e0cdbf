"""Attention of transformers' modules over our paged cache.

transformers gives every attention module a function by name; ours is "echelon". It takes no mask and no cache from
transformers: the step's metadata say who sees what. Before the cache exists, one pass inside `probing` notes what each
layer asks for; the cache and the layers' `Attention` are made from that.

Shapes: T tokens, H query heads, K KV heads, D head size, E head size of values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workers.api.errors import ConfigError
from workers.layers.attention import Attention
from workers.models.plain_attention import PlainAttention

NAME = "echelon"  # of the attention function
CHILD = "paged"  # the name of `Attention` inside of a transformers attention module
# What some modules give their attention function, and what the paged cache cannot honour.
_REFUSED = ("position_bias", "indices", "block_indices")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a layer's attention asks for. Counts of heads are this rank's; 0 stands for none of window and chunk."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def make(self, layer: int) -> Attention:
        """The layer's attention: the kernels where they do, plain torch where they do not."""
        plain = bool(self.chunk or self.softcap or self.sinks)
        shape = (layer, self.heads, self.kv_heads, self.head_size)
        if plain:
            return PlainAttention(*shape, scale=self.scale, window=self.window, chunk=self.chunk, softcap=self.softcap)
        return Attention(*shape, scale=self.scale, window=self.window)


class _Probe(threading.local):
    seen: dict[int, tuple[nn.Module, Asked]] | None = None


_probe = _Probe()


@contextmanager
def probing() -> Iterator[dict[int, tuple[nn.Module, Asked]]]:
    """Inside, nothing is cached: each layer's attention module and what it asks for are noted, by layer index."""
    _probe.seen = {}
    try:
        yield _probe.seen
    finally:
        _probe.seen = None


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [1, H, T, D], key [1, K, T, D], value [1, K, T, E], already rotated -> [1, T, H, E].

    `module` has a `layer_idx`. Stores keys and values and attends to all that is cached of each token's sequence.
    """
    heads, tokens, size = query.shape[1:]
    kv_heads, value_size = value.shape[1], value.shape[3]
    wide = max(size, value_size)
    if _probe.seen is not None:
        asked = Asked(heads, kv_heads, wide, scale, window, chunk, softcap, sinks is not None)
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in _probe.seen:
            raise ConfigError(f"{type(module).__name__} with layer_idx {layer!r}: a layer needs one index of its own")
        _probe.seen[layer] = (module, asked)
        return value.repeat_interleave(heads // kv_heads, dim=1).transpose(1, 2)
    attention = getattr(module, CHILD)
    flat = [_flat(x, wide) for x in (query, key, value)]
    out = attention(*flat) if sinks is None else attention(*flat, sinks=sinks)
    return out.view(1, tokens, heads, wide)[..., :value_size]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """`paged_attention` as transformers calls it. Raises ConfigError on what cannot be honoured."""
    bad = [name for name in _REFUSED if given.get(name) is not None]
    if bad or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ConfigError(f"{type(module).__name__} is not causal or gives {', '.join(bad)}: it needs a rewrite")
    config = getattr(module, "config", None)
    window, chunk = _limits(config, getattr(module, "layer_idx", None), sliding_window)
    cap = softcap if softcap is not None else getattr(module, "attn_logit_softcapping", None)
    return paged_attention(
        module, query, key, value,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling), window=window, chunk=chunk,
        softcap=float(cap or 0.0), sinks=s_aux if s_aux is not None else sinks,
    ), None  # fmt: skip


def _limits(config: Any, layer: int | None, given: int | None) -> tuple[int, int]:
    """(window, chunk) of a layer: what the module gives, else what the config says of its kind."""
    kinds = getattr(config, "layer_types", None)
    kind = "full_attention" if not kinds or layer is None or layer >= len(kinds) else kinds[layer]
    if kind == "chunked_attention":
        return 0, int(config.attention_chunk_size)
    if kind == "sliding_attention":
        return int(given or config.sliding_window or 0), 0
    if kind != "full_attention":
        raise ConfigError(f"layer {layer} is of kind {kind!r}, which the paged cache does not know")
    return int(given or 0) if not kinds else 0, 0


def _flat(x: torch.Tensor, size: int) -> torch.Tensor:
    """[1, N, T, D] -> [T, N * size], zeros behind each head."""
    x = x[0].transpose(0, 1)
    if x.shape[-1] < size:
        x = F.pad(x, (0, size - x.shape[-1]))
    return x.reshape(x.shape[0], -1)
