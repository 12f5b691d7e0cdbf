"""The masks of a step, computed beside the engine's thread, and no step waits for slow ones.

Most masks are there long before the device is through its forward pass. Those that are not are left out: their
sequences draw nothing in this step and come again in the next, where the masks may be there. So what a grammar costs is
paid by those who have one. Sequences that are likely to be slow are computed apart from the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState
from workers.engine.plan import StepMasks

log = logging.getLogger("echelon.grammar")

_FEW = 0.02  # of the vocabulary: a mask of fewer tokens is quick


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A draw in `slot` after `new`, tokens that `state` has not seen; without a state the mask is all ones.

    `can_wait`: whether the draw may be left to a later step.
    """

    slot: int
    state: GrammarState | None
    new: Sequence[int]
    can_wait: bool


class MaskJobs:
    """The jobs of one engine. A state is in one at a time, which is kept with it (`GrammarState.job`)."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        # Rows that must be waited for, quick ones, slow ones: a job each. Within one llguidance has threads of its own,
        # which do not hold the interpreter's lock.
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="echelon-masks")
        self._all = b"\xff" * (grammars.words * 4)

    def masks(
        self, step: int, rows: Sequence[MaskedRow], *, patience: float, alone: bool
    ) -> tuple[StepMasks, frozenset[int]]:
        """The masks of a step, after at most `patience` seconds where nobody must be waited for; and the slots whose
        draws are left out: what is drawn there means nothing.

        `alone`: nobody else draws in this step, so that one of these must.
        """
        until = time.perf_counter() + patience
        held = {row.slot: row.state for row in rows if row.state is not None}
        self._begin(rows)
        jobs, urgent = set(), set()
        for row in rows:
            if row.state is not None and row.state.job is not None:
                jobs.add(row.state.job)
                if not row.can_wait:
                    urgent.add(row.state.job)
        wait(urgent)
        wait(jobs, timeout=max(0.0, until - time.perf_counter()))
        if alone:
            wait(jobs, return_when=FIRST_COMPLETED)
        found: dict[int, bytes] = {}
        for slot, state in held.items():
            if state.job is not None and state.job.done():
                found[slot], state.job = state.job.result()[state], None
        bits = b"".join([found.get(row.slot, self._all) for row in rows])
        return StepMasks(step, tuple([row.slot for row in rows]), bits), frozenset(held.keys() - found.keys())

    def _begin(self, rows: Sequence[MaskedRow]) -> None:
        urgent: list[tuple[GrammarState, Sequence[int]]] = []
        quick, slow = urgent[:], urgent[:]
        for row in rows:
            state = row.state
            if state is not None and state.job is None:
                (urgent if not row.can_wait else slow if state.is_slow else quick).append((state, row.new))
        for group in (urgent, quick, slow):
            if group:
                job = self._pool.submit(self._masks, group)
                for state, _ in group:
                    state.job = job

    def _masks(self, rows: Sequence[tuple[GrammarState, Sequence[int]]]) -> dict[GrammarState, bytes]:
        try:
            masks = self._grammars.masks(rows)
        except Exception as e:  # whatever the library raises: it ends these requests, and no others
            log.exception("masks could not be computed")
            for state, _ in rows:
                state.error = str(e)
            masks = [bytes(len(self._all))] * len(rows)
        for (state, _), mask in zip(rows, masks, strict=True):
            state.guess(int.from_bytes(mask, "little").bit_count(), _FEW * len(mask) * 8)
        return {state: mask for (state, _), mask in zip(rows, masks, strict=True)}
