"""The masks of a step, by threads beside the engine's, and no step waits for a slow one.

Most masks are there long before the device is through its forward pass. One that is not is left out: its sequence draws
nothing in this step and comes again in the next, where its mask may be there. So what a grammar costs is paid by
whoever has it. Threads do not hold the interpreter's lock while llguidance works; each takes the next row as it is done
with one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState
from workers.engine.plan import StepMasks

log = logging.getLogger("echelon.grammar")

_MOST_THREADS = 8  # more are in each other's way
_LOOK_AGAIN = 2e-4  # seconds


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A draw in `slot` after `new`, tokens that `state` has not seen; without a state the mask is all ones.

    `can_wait`: whether the draw may be left to a later step.
    """

    slot: int
    state: GrammarState | None
    new: Sequence[int]
    can_wait: bool


class MaskJob:
    """Of one sequence; `row` is its mask, None until it is there."""

    __slots__ = ("new", "row", "state")

    def __init__(self, state: GrammarState, new: Sequence[int]) -> None:
        self.state, self.new = state, new
        self.row: bytes | None = None


class _Batch:
    """Jobs that were begun together, the first `urgent` of which must be waited for."""

    def __init__(self, jobs: Sequence[MaskJob], urgent: int, mask: Callable[[MaskJob], bytes]) -> None:
        self._jobs, self._urgent, self._mask = jobs, urgent, mask
        self._begun, self._ended, self._urgent_ended = count(), count(1), count(1)
        self.one, self.urgent, self.all = threading.Event(), threading.Event(), threading.Event()

    def work(self) -> None:
        """In each of some threads, until nothing is left to begin."""
        while (i := next(self._begun)) < len(self._jobs):
            self._jobs[i].row = self._mask(self._jobs[i])
            self.one.set()
            if i < self._urgent and next(self._urgent_ended) == self._urgent:
                self.urgent.set()
            if next(self._ended) == len(self._jobs):
                self.all.set()


class MaskJobs:
    """The jobs of one engine. Of a state there is one at a time, kept with it (`GrammarState.job`)."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._threads = max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0)) * 3 // 4))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="echelon-masks")
        self._all = b"\xff" * (grammars.words * 4)

    def masks(
        self, step: int, rows: Sequence[MaskedRow], *, patience: float, alone: bool
    ) -> tuple[StepMasks, frozenset[int]]:
        """The masks of a step, after at most `patience` seconds where nobody must be waited for; and the slots whose
        draws are left out: what is drawn there means nothing.

        `alone`: nobody else draws in this step, so that one of these must.
        """
        held = {row.slot: row.state for row in rows if row.state is not None}
        fresh = [row for row in rows if row.state is not None and row.state.job is None]
        batch = self._begin(sorted(fresh, key=lambda row: row.can_wait)) if fresh else None
        if batch is not None:
            batch.all.wait(patience)
            if not all(row.can_wait for row in fresh):
                batch.urgent.wait()
        found: dict[int, bytes] = {}
        while not found:
            for slot, state in held.items():
                if state.job is not None and state.job.row is not None:
                    found[slot], state.job = state.job.row, None
            if not alone or found or not held:
                break
            if batch is not None:
                batch.one.wait()
            else:  # whoever is there waits from before
                time.sleep(_LOOK_AGAIN)
        bits = b"".join([found.get(row.slot, self._all) for row in rows])
        return StepMasks(step, tuple([row.slot for row in rows]), bits), frozenset(held.keys() - found.keys())

    def _begin(self, rows: Sequence[MaskedRow]) -> _Batch:
        jobs = []
        for row in rows:
            assert row.state is not None
            row.state.job = MaskJob(row.state, row.new)
            jobs.append(row.state.job)
        batch = _Batch(jobs, sum(not row.can_wait for row in rows), self._mask)
        for _ in range(min(self._threads, len(jobs))):
            self._pool.submit(batch.work)
        return batch

    def _mask(self, job: MaskJob) -> bytes:
        try:
            return self._grammars.mask(job.state, job.new)
        except Exception as e:  # whatever the library raises: it ends this request, and no other
            log.exception("a mask could not be computed")
            job.state.error = str(e)
            return bytes(len(self._all))
