"""A plan as flat arrays on the host: what both ways to run a step, launched and captured, are filled from.

Shapes: T tokens, B sequences, D of them decodes, E emitting rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.api.errors import EngineFault
from workers.engine.plan import StepPlan
from workers.execution.upload import Array

Changes = tuple[Array, Array, Array, Array]  # places and values of tokens, then of block table entries


@dataclass(frozen=True, slots=True)
class FlatStep:
    """The tokens of a step beside each other, decodes first.

    token_at [T]: where in the flat token table a token is read; positions [T]; slots [T] in the KV cache; seqs [B]: the
    sequences' slots; lens [B]: positions known after the step; query [B - D]: tokens of each longer sequence.
    emit_index [E]: tokens after which one is drawn (None: all in order); emit_at [E]: where in the token table the
    drawn ones go; emit_slots [E]; drawn_at [E]: their positions. lengths [T]: see
    `AttentionMetadata`. All int64.
    """

    token_at: Array
    positions: Array
    slots: Array
    seqs: Array
    lens: Array
    query: Array
    decodes: int
    emit_index: Array | None
    emit_at: Array
    emit_slots: Array
    drawn_at: Array
    changes: Changes | None
    lengths: Array | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.positions)


def flatten(
    plan: StepPlan, tables: Array, *, block_size: int, width: int, changes: Changes | None, prompts: Array | None = None
) -> FlatStep:
    """The step of `plan`, whose changes `tables` [slots, M] already holds; `width` is a row of the token table.
    `prompts` [slots] int64 are the prompts' lengths, where rotations go by them.

    Raises EngineFault on a plan that cannot be run.
    """
    table = np.array([(s.slot, s.start, s.count, s.emit) for s in plan.scheduled], np.int64)
    seqs, starts, counts, emits = np.ascontiguousarray(table.T)
    ends = starts + counts
    decodes = int((counts == 1).sum())
    if (counts[:decodes] != 1).any() or emits.max() > 1:
        raise EngineFault(f"the plan of step {plan.step} is out of order, or emits several tokens a sequence")
    if int(ends.max()) >= width:
        raise EngineFault(f"the plan of step {plan.step} runs past the context of {width - 1} tokens")
    if decodes == len(counts):
        rows, positions = seqs, starts
    else:
        rows = np.repeat(seqs, counts)
        first = np.cumsum(counts) - counts
        positions = np.arange(len(rows)) + np.repeat(starts - first, counts)
    blocks = tables[rows, positions // block_size].astype(np.int64)
    emitting = emits > 0
    everyone = decodes == len(counts) and bool(emitting.all())
    emit_slots, drawn_at = (seqs, ends) if everyone else (seqs[emitting], ends[emitting])
    return FlatStep(
        token_at=rows * width + positions,
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        seqs=seqs,
        lens=ends,
        query=counts[decodes:],
        decodes=decodes,
        emit_index=None if everyone else (np.cumsum(counts) - 1)[emitting],
        emit_at=emit_slots * width + drawn_at,
        emit_slots=emit_slots,
        drawn_at=drawn_at,
        changes=changes,
        lengths=None if prompts is None else np.maximum(prompts[rows], positions + 1),
    )
