"""The forward context: what a step knows and a model's code does not.

The runner sets it around a forward pass; the attention op finds its metadata and its cache there by layer index, the
embedding layer its override. It is the one mutable place of its kind, and each thread has its own, so that engines in
one process do not see each other's. Source: vLLM RFC 9098.

Shapes: T tokens, B sequences, N blocks, S block size, K KV heads, D head size, M blocks a sequence, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.dense_prefill import DensePrompts


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The sequences of one query token. block_tables [B, M] int32, kv_lens [B] int32; max_kv bounds kv_lens.

    rows [B] int32: which token of the step each is, None: in their order.
    memo: see `kernels.kv_cache.Memo`; here as below it is for these very tensors.
    """

    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    max_kv: int
    rows: torch.Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """The sequences of several query tokens. As `DecodeBatch`; cu_query [B + 1] int32 counts from token `first`.

    `dense` are whole prompts that `dense_prefill` takes; for the rest they are sequences with kv_len 0. Without `rest`
    there is nothing else. dense_slots: the step's slots, and behind them some of real keys, as far as `dense` reads.
    """

    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    cu_query: torch.Tensor
    max_query: int
    max_kv: int
    first: int
    dense: tuple[DensePrompts, ...] = ()
    dense_slots: torch.Tensor | None = None
    rest: bool = True
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of a step stand. Decodes come first: the tokens before num_decodes.

    In a padded step some of these rows have kv_len 0: their tokens may be those of `prefill`, or nobody's.
    slots [T] int64: block * S + offset, negative for a token whose key and value are not stored.
    `batch_invariant`: see `kernels.invariant_attention`. lengths [T] int64: by which rotations go that are scaled by a
    sequence's length, see `workers.layers.rotary`; None: all by the step's last position.
    """

    slots: torch.Tensor
    num_decodes: int
    decode: DecodeBatch | None
    prefill: PrefillBatch | None
    batch_invariant: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)
    lengths: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [N, S, K, D]."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class EmbeddingOverride:
    """Rows `index` [n] int64 of the step's input embeddings are replaced by `values` [n, C]."""

    index: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One forward pass. `attention` and `caches` have an entry a layer, often the same metadata for all."""

    attention: Sequence[AttentionMetadata]
    caches: Sequence[LayerCache]
    embeddings: EmbeddingOverride | None = None


class _Current(threading.local):
    context: ForwardContext | None = None


_current = _Current()


def current() -> ForwardContext:
    """The context of the forward pass under way on this thread. Raises RuntimeError outside of one."""
    context = _current.context
    if context is None:
        raise RuntimeError("no forward context: run the model inside `workers.context.forward_context`")
    return context


def embedding_override() -> EmbeddingOverride | None:
    """The override of the forward pass under way, if there is one."""
    context = _current.context
    return None if context is None else context.embeddings


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Set the context of this thread for the time of the `with` block; blocks nest."""
    before = _current.context
    _current.context = context
    try:
        yield
    finally:
        _current.context = before
