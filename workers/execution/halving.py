"""A step that is out of memory, cut into smaller ones: how, and in which order these may run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from workers.engine.plan import ScheduledSequence
from workers.execution.sampling_state import PromptRows
from workers.execution.upload import Array

_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",  # Triton's
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, has no memory for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no type of error for the CPU's tensors, nor for what libraries and the driver allocate themselves.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def independent_order(runs: Sequence[ScheduledSequence], tables: Array, block_size: int) -> list[ScheduledSequence]:
    """`runs` of one step in an order in which none reads from the cache what a later one writes there.

    In one step the order does not matter, so a sequence may have hit blocks that another one computes beside it.
    `tables` [slots, M] are the block tables.
    """
    writer = {
        int(block): run
        for run in runs
        for block in tables[run.slot, run.start // block_size : -(-(run.start + run.count) // block_size)]
    }
    order: list[ScheduledSequence] = []
    met: set[int] = set()

    def put(run: ScheduledSequence) -> None:
        met.add(run.slot)
        for block in tables[run.slot, : run.start // block_size]:
            before = writer.get(int(block))
            if before is not None and before.slot not in met:
                put(before)
        order.append(run)

    for run in runs:
        if run.slot not in met:
            put(run)
    return order


def halves(runs: Sequence[ScheduledSequence]) -> tuple[list[ScheduledSequence], list[ScheduledSequence]] | None:
    """`runs` as two parts of about as many tokens, to be run one after the other; None for a single token.

    New blocks are not in them any more: the tables have these already.
    """
    plain = [replace(run, new_blocks=()) for run in runs]
    half = sum(run.count for run in plain) // 2
    if not half:
        return None
    first: list[ScheduledSequence] = []
    while plain and plain[0].count <= half:
        half -= plain[0].count
        first.append(plain.pop(0))
    if half and (plain[0].count > 1 and not first):
        cut = plain[0]
        first.append(replace(cut, count=half, emit=0))
        plain[0] = replace(cut, start=cut.start + half, count=cut.count - half)
    return first, plain


def in_step_order(runs: Sequence[ScheduledSequence]) -> tuple[ScheduledSequence, ...]:
    """As a plan has them: those of one token first."""
    return tuple(sorted(runs, key=lambda run: run.count > 1))


def rows_of(runs: Sequence[ScheduledSequence], wanted: Sequence[PromptRows]) -> list[PromptRows]:
    """What of `wanted`, rows of a whole step, are rows of a step of these `runs`."""
    found: list[PromptRows] = []
    first = 0
    for run in runs:
        for rows in wanted:
            if rows.slot == run.slot:
                # The row at position p is scored for the token at p + 1.
                low, end = max(rows.start - 1, run.start), min(rows.start - 1 + rows.count, run.start + run.count)
                if low < end:
                    found.append(PromptRows(run.slot, first + low - run.start, low + 1, end - low, rows.top))
        first += run.count
    return found
