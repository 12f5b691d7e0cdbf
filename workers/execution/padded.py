"""A step of fixed shape over tensors at fixed addresses, as a CUDA graph needs it.

What a step has less than its shape is padding: such tokens are read from, and written to, the tables' last row, which
is nobody's; their keys are not stored, and their sequences have no length.

Shapes: T tokens, D decodes, P longer sequences, E emitting rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.paged_decode import ORDERED_FROM, longest_first
from workers.context import (
    AttentionMetadata,
    DecodeBatch,
    ForwardContext,
    LayerCache,
    PrefillBatch,
    forward_context,
)
from workers.execution.flat import FlatStep
from workers.execution.inputs import BatchState
from workers.execution.upload import Array
from workers.models.base import CausalModel

_ALIGN = 16  # bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """The most that a padded step holds. `prefills` 0: decodes only, each of which draws."""

    tokens: int
    decodes: int
    prefills: int
    emits: int

    @staticmethod
    def decode(tokens: int) -> StepShape:
        """A step of decodes alone."""
        return StepShape(tokens, tokens, 0, tokens)

    @staticmethod
    def mixed(tokens: int, max_num_seqs: int) -> StepShape:
        """A step of so many tokens in all, but not in very many short pieces."""
        most = min(tokens, max_num_seqs)
        # Every longer sequence that might come costs attention some empty programs.
        return StepShape(tokens, most, max(1, min(tokens // 16, max_num_seqs)), most)

    def holds(self, flat: FlatStep) -> bool:
        """Whether `flat` fits."""
        longer = len(flat.query)
        return flat.num_tokens <= self.tokens and flat.decodes <= self.decodes and longer <= self.prefills


class PaddedInputs:
    """The inputs of one shape: views of `buffer` [bytes] on the device, filled by one copy."""

    def __init__(self, shape: StepShape, state: BatchState, buffer: torch.Tensor) -> None:
        nowhere, nobody = state.max_num_seqs * state.width, state.max_num_seqs
        fields: dict[str, tuple[int, type, int]] = {
            "token_at": (shape.tokens, np.int64, nowhere),
            "positions": (shape.tokens, np.int64, 0),
            "slots": (shape.tokens, np.int64, -1),
            "decode_seqs": (shape.decodes, np.int64, nobody),
            "decode_lens": (shape.decodes, np.int32, 0),
            "emit_at": (shape.emits, np.int64, nowhere),
        }
        if state.prompts is not None:
            fields["lengths"] = (shape.tokens, np.int64, 0)
        self._ordered = shape.decodes >= ORDERED_FROM
        if self._ordered:
            fields["decode_rows"] = (shape.decodes, np.int32, 0)
        if shape.prefills:
            fields["emit_index"] = (shape.emits, np.int64, 0)
            fields["prefill_seqs"] = (shape.prefills, np.int64, nobody)
            fields["prefill_lens"] = (shape.prefills, np.int32, 0)
            fields["cu_query"] = (shape.prefills + 1, np.int32, 0)
        self._spans: dict[str, tuple[int, int, type]] = {}
        self._size = 0
        for name, (count, dtype, _) in fields.items():
            bytes_needed = count * np.dtype(dtype).itemsize
            self._spans[name] = (self._size, self._size + bytes_needed, dtype)
            self._size += -(-bytes_needed // _ALIGN) * _ALIGN
        self._padding = np.zeros(self._size, np.uint8)
        for name, view in self._views(self._padding).items():
            view[:] = fields[name][2]
        if self._ordered:  # each once, whatever is padding
            self._views(self._padding)["decode_rows"][:] = np.arange(shape.decodes)
        self._device, self._host = buffer[: self._size], state.host
        types: dict[type, torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32}
        self.on_device = {n: buffer[a:b].view(types[dtype]) for n, (a, b, dtype) in self._spans.items()}

    @staticmethod
    def bytes_needed(shape: StepShape) -> int:
        """At least what a buffer for this shape takes."""
        return 8 * (4 * shape.tokens + 3 * shape.decodes + 2 * shape.emits + 3 * shape.prefills) + 12 * _ALIGN

    def _views(self, host: Array) -> dict[str, Array]:
        return {name: host[a:b].view(dtype) for name, (a, b, dtype) in self._spans.items()}

    def clear(self) -> None:
        """Nothing but padding."""
        self._device.copy_(torch.from_numpy(self._padding))

    def fill(self, flat: FlatStep) -> None:
        """Queue the copy of a step that fits the shape."""
        staging = self._host.lend(self._size)
        host = staging.numpy()
        host[:] = self._padding
        to, tokens, decodes, emits = self._views(host), flat.num_tokens, flat.decodes, len(flat.emit_at)
        to["token_at"][:tokens] = flat.token_at
        to["positions"][:tokens] = flat.positions
        to["slots"][:tokens] = flat.slots
        if flat.lengths is not None:
            to["lengths"][:tokens] = flat.lengths
        seqs, lens = flat.seqs[:decodes], flat.lens[:decodes]
        if self._ordered:
            order = to["decode_rows"][:decodes] = longest_first(lens)
            seqs, lens = seqs[order], lens[order]
        to["decode_seqs"][:decodes] = seqs
        to["decode_lens"][:decodes] = lens
        to["emit_at"][:emits] = flat.emit_at
        if "cu_query" in to:
            longer = len(flat.query)
            to["emit_index"][:emits] = np.arange(emits) if flat.emit_index is None else flat.emit_index
            to["prefill_seqs"][:longer] = flat.seqs[decodes:]
            to["prefill_lens"][:longer] = flat.lens[decodes:]
            to["cu_query"][:] = tokens
            to["cu_query"][0] = decodes
            to["cu_query"][1 : longer + 1] = decodes + np.cumsum(flat.query)
        self._device.copy_(staging, non_blocking=True)


class PaddedStep:
    """Model, greedy draw and write to the token table, all in the inputs' fixed tensors.

    `own_logits` (of this rank, see `CausalModel`) and `tokens` [E] int64 are those of the last `run`, or of the last
    replay of its capture.
    """

    own_logits: torch.Tensor
    tokens: torch.Tensor

    def __init__(
        self,
        model: CausalModel,
        caches: Sequence[LayerCache],
        state: BatchState,
        shape: StepShape,
        buffer: torch.Tensor,
    ) -> None:
        self.shape, self.inputs = shape, PaddedInputs(shape, state, buffer)
        self._model, self._caches, self._state = model, tuple(caches), state

    @torch.inference_mode()
    def run(self) -> None:
        """One step of what the inputs hold."""
        state, t, longest = self._state, self.inputs.on_device, self._state.max_model_len
        tables = state.block_table.index_select(0, t["decode_seqs"])
        decode = DecodeBatch(tables, t["decode_lens"], longest, t.get("decode_rows"))
        prefill = None
        if self.shape.prefills:
            tables = state.block_table.index_select(0, t["prefill_seqs"])
            # Counted from the first token of all: how many decodes there are is not known when it is captured.
            prefill = PrefillBatch(tables, t["prefill_lens"], t["cu_query"], self.shape.tokens, longest, first=0)
        metadata = AttentionMetadata(
            t["slots"], self.shape.decodes, decode, prefill, state.batch_invariant, lengths=t.get("lengths")
        )
        with forward_context(ForwardContext((metadata,) * len(self._caches), self._caches)):
            hidden = self._model(state.flat_tokens.index_select(0, t["token_at"]), t["positions"])
            if self.shape.prefills:
                hidden = hidden.index_select(0, t["emit_index"])
            self.own_logits = self._model.own_logits(hidden)
        self.tokens = self._model.greedy_tokens(self.own_logits)
        state.write_tokens(t["emit_at"], self.tokens)
