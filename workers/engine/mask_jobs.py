"""The masks of a step, a job each for threads beside the engine's, and no step waits for a slow one.

Most masks are there long before the device is through its forward pass. One that is not is left out: its sequence draws
nothing in this step and comes again in the next, where the job may have ended. So what a grammar costs is paid by
whoever has it. Threads do not hold the interpreter's lock while llguidance works.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState
from workers.engine.plan import StepMasks

log = logging.getLogger("echelon.grammar")

_MOST_THREADS = 16


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
    """The jobs of one engine. Of a state there is one job at a time, kept with it (`GrammarState.job`)."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        threads = max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0)) * 3 // 4))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="echelon-masks")
        self._all = b"\xff" * (grammars.words * 4)

    def masks(
        self, step: int, rows: Sequence[MaskedRow], *, patience: float, alone: bool
    ) -> tuple[StepMasks, frozenset[int]]:
        """The masks of a step, after at most `patience` seconds where nobody must be waited for; and the slots whose
        draws are left out: what is drawn there means nothing.

        `alone`: nobody else draws in this step, so that one of these must.
        """
        jobs = {row.slot: self._job(row.state, row.new) for row in rows if row.state is not None}
        wait(jobs.values(), timeout=patience)
        wait([jobs[row.slot] for row in rows if row.slot in jobs and not row.can_wait])
        if alone:
            wait(jobs.values(), return_when=FIRST_COMPLETED)
        found = {slot: job.result() for slot, job in jobs.items() if job.done()}
        for row in rows:
            if row.state is not None and row.slot in found:
                row.state.job = None
        bits = b"".join([found.get(row.slot, self._all) for row in rows])
        return StepMasks(step, tuple([row.slot for row in rows]), bits), frozenset(jobs.keys() - found.keys())

    def _job(self, state: GrammarState, new: Sequence[int]) -> Future[bytes]:
        if state.job is None:
            state.job = self._pool.submit(self._mask, state, new)
        return state.job

    def _mask(self, state: GrammarState, new: Sequence[int]) -> bytes:
        try:
            return self._grammars.mask(state, new)
        except Exception as e:  # whatever the library raises: it ends this request, and no other
            log.exception("a mask could not be computed")
            state.error = str(e)
            return bytes(len(self._all))
