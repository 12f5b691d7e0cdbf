"""`StepContext`: what a step knows, in the form that rewrites of transformers modules ask for.

It is a view of the forward context: native models never need it. Source: lmdeploy.pytorch's documentation, 2024.

Shapes: T tokens, B sequences (in the order of their tokens), M blocks a sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from workers.context import AttentionMetadata, ForwardContext, LayerCache, forward_context


class StepContext:
    """One step. What is derived is made when it is first asked for, so that a step pays for what it uses.

    The tokens of the sequences stand beside each other, decodes first. A prompt whose head goes to another kernel is
    two sequences here, the second with the first as its history.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward: ForwardContext,
        *,
        world_size: int = 1,
        json_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.inputs = self.input_ids = input_ids  # [T]
        self.position_ids_1d = positions  # [T]
        self.forward = forward
        self.world_size, self.json_config = world_size, dict(json_config or {})
        # Adapters are not served: these stay as they are.
        self.local_adapter_ids = self.global_adapter_ids = self.adapter_offsets = None
        self.max_rank = 0

    @property
    def attention(self) -> AttentionMetadata:
        """Of the first layer, and so of all."""
        return self.forward.attention[0]

    @property
    def position_ids(self) -> torch.Tensor:
        """[1, T]."""
        return self.position_ids_1d.unsqueeze(0)

    @property
    def kv_caches(self) -> Sequence[LayerCache]:
        """Keys and values of each layer."""
        return self.forward.caches

    @property
    def slots(self) -> torch.Tensor:
        """[T] int64, where in the cache each token's key and value go."""
        return self.attention.slots

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has one token in this step."""
        return self.attention.prefill is None

    @cached_property
    def block_offsets(self) -> torch.Tensor:
        """[B, M] int32, the numbers of each sequence's blocks."""
        return torch.cat([batch.block_tables for batch in self._batches])

    @cached_property
    def seq_length(self) -> torch.Tensor:
        """[B] int64, tokens of each sequence in this step."""
        parts = []
        if self.attention.decode is not None:
            parts.append((self.attention.decode.kv_lens > 0).long())
        if self.attention.prefill is not None:
            parts.append(self.attention.prefill.cu_query.diff().long())
        return torch.cat(parts)

    @property
    def q_seq_length(self) -> torch.Tensor:
        """`seq_length` by its other name."""
        return self.seq_length

    @cached_property
    def q_start_loc(self) -> torch.Tensor:
        """[B] int64, where each sequence's first token stands."""
        first = []
        if self.attention.decode is not None:
            first.append(torch.arange(self.attention.num_decodes, device=self.input_ids.device))
        if self.attention.prefill is not None:
            first.append(self.attention.prefill.cu_query[:-1].long() + self.attention.prefill.first)
        return torch.cat(first)

    @cached_property
    def kv_seq_length(self) -> torch.Tensor:
        """[B] int64, tokens of each sequence that are known after this step."""
        known = torch.cat([batch.kv_lens for batch in self._batches]).long()
        return torch.where(known == 0, self.seq_length, known)

    @cached_property
    def history_lengths(self) -> torch.Tensor:
        """[B] int64, tokens of each sequence from earlier steps."""
        return self.kv_seq_length - self.seq_length

    @cached_property
    def max_seq_length(self) -> int:
        """Of `seq_length`; waits for the device."""
        return int(self.seq_length.max())

    @property
    def _batches(self) -> list[Any]:
        return [batch for batch in (self.attention.decode, self.attention.prefill) if batch is not None]

    @contextmanager
    def active(self) -> Iterator[None]:
        """This is the step of this thread for the time of the `with` block, and its forward context too."""
        before = _current.step
        _current.step = self
        try:
            with forward_context(self.forward):
                yield
        finally:
            _current.step = before


class _Current(threading.local):
    step: StepContext | None = None


_current = _Current()


def step_context() -> StepContext:
    """The step under way on this thread. Raises RuntimeError outside of one."""
    if _current.step is None:
        raise RuntimeError("no step: run the module inside `StepContext.active()`")
    return _current.step
