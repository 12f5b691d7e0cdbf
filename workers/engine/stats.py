"""Counters of an engine, and the report made of them."""

from __future__ import annotations

from dataclasses import dataclass

from workers.api.request import FinishReason, RequestCounts


@dataclass(slots=True)
class Stats:
    """Mutable counters, tokens unless named otherwise. `step_*` are of the last committed step, the rest since start.

    Always: executed == prefill + decode + overhead.
    """

    steps: int = 0
    step_seconds: float = 0.0  # device time
    step_prefill: int = 0
    step_decode: int = 0
    step_overhead: int = 0
    executed: int = 0
    prefill: int = 0
    decode: int = 0
    overhead: int = 0  # recomputed after preemption or replay, or discarded
    preemptions: int = 0
    steps_cut: int = 0  # that had no memory as a whole
    put_off: int = 0  # draws left to the next step, since their masks were not there
    prefix_queries: int = 0
    prefix_hits: int = 0
    host_hits: int = 0  # of them, in host memory alone
    accepted: int = 0
    completed: int = 0
    aborted: int = 0
    failed: int = 0
    host_seconds: float = 0.0  # planning, submitting and committing
    wait_seconds: float = 0.0  # waiting for results: what the device takes longer than the host

    def count_step(self, seconds: float, executed: int, prefill: int, decode: int, overhead: int) -> None:
        """A step is committed; it ran `executed` tokens and took the device `seconds`."""
        self.steps += 1
        self.step_seconds = seconds
        self.step_prefill, self.step_decode, self.step_overhead = prefill, decode, overhead
        self.executed += executed
        self.prefill += prefill
        self.decode += decode
        self.overhead += overhead

    def count_finish(self, reason: FinishReason) -> None:
        """A request has had its terminal delta."""
        if reason is FinishReason.ABORT:
            self.aborted += 1
        elif reason is FinishReason.ERROR:
            self.failed += 1
        else:
            self.completed += 1

    def requests(self, live: int) -> RequestCounts:
        """The request ledger, with `live` requests waiting or running."""
        return RequestCounts(
            accepted=self.accepted, completed=self.completed, aborted=self.aborted, failed=self.failed, running=live
        )
