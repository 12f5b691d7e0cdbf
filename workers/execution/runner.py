"""`Runner`: runs plans on one rank's device (the engine's `Executor`).

On CUDA a submitted step is queued on the stream and the host goes on; the drawn tokens are copied to pinned memory
behind an event, and nothing else waits. After `capture`, steps that fit a captured shape are replayed. On the CPU a
step runs in one worker thread, or at once in `submit`.

A step with masked slots is submitted without its masks: its forward pass runs while the host computes them, and the
draws of the whole step follow with `Runner.draw`.

A step that is out of memory, on any rank, is run in halves, one after the other, and these in halves, before the next
step begins: who planned it sees but a slower one. A sequence that finds no room for a single token ends with a fault;
the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch

from workers.api.errors import EchelonError, EngineFault, OutOfMemory
from workers.context import LayerCache
from workers.engine.plan import ScheduledSequence, SlotResult, StepHandle, StepMasks, StepPlan, StepResult
from workers.execution.cache import BlockCopies
from workers.execution.graphs import StepGraphs
from workers.execution.halving import halves, in_step_order, is_out_of_memory, rows_of
from workers.execution.inputs import BatchState
from workers.execution.passes import Passes
from workers.execution.swap import HostCache
from workers.execution.under_way import Begun, Deferred, Launched, Part, Waiting, read_part, that_failed
from workers.models.base import CausalModel
from workers.parallel.group import Group

log = logging.getLogger("echelon.runner")

T = TypeVar("T")


class Runner:
    """Runs the plans of one engine, in order. `caches` has an entry a layer.

    `threaded` (CPU only): a worker thread runs the steps, so that the caller may plan the next one meanwhile.
    `collect`: whether results are brought to the host; ranks other than 0 leave that to rank 0.
    `halves`: whether a step that is out of memory is run in parts; with several ranks, all of which must then run the
    same, `group` needs an `attendance` for that.
    `swap`: where plans copy blocks to and from; None: they do not.
    """

    def __init__(
        self,
        model: CausalModel,
        caches: Sequence[LayerCache],
        state: BatchState,
        *,
        rank: int = 0,
        group: Group | None = None,
        threaded: bool = False,
        collect: bool = True,
        halves: bool = True,
        swap: HostCache | None = None,
    ) -> None:
        self.passes = Passes(model, caches, state, group or Group("tp"), collect=collect, careful=halves)
        self.caches, self.state, self.rank, self.device = self.passes.caches, state, rank, state.device
        self._swap, self._copies = swap, BlockCopies(self.caches)
        self._lost: dict[int, str] = {}  # slots whose sequence had no memory, until they are somebody else's
        self._waiting: Waiting | None = None  # submitted last, and for masks
        self._open: Launched | None = None  # the one whose vote is not counted yet
        self._pool = (
            ThreadPoolExecutor(1, thread_name_prefix=f"echelon-rank{rank}")
            if threaded and self.device.type == "cpu"
            else None
        )
        # The vote on a step is counted when the next one begins, or when its result is asked for. Where nobody asks
        # that may be never, and in another thread it would be out of turn.
        self._waits = collect and self._pool is None

    def capture(
        self, max_num_batched_tokens: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """CUDA only: from now on steps are replayed where they can be. Waits for the device; takes seconds.

        `progress` is told how many of how many shapes are captured. All ranks of the group at once, with the same
        arguments. Raises OutOfMemory.
        """
        graphs = StepGraphs(self.passes.model, self.caches, self.state, max_num_batched_tokens, self.passes.group)
        try:
            graphs.capture(progress)
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(f"rank {self.rank}: no room for CUDA graphs: {e}; lower cache_fraction") from e
        self.passes.graphs = graphs

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Never raises for a step's own fault: the handle does."""
        fault = self._settle_last(plan)
        if plan.masked:
            self._waiting = waiting = Waiting(
                self._begin_masked(plan) if fault is None else lambda _: that_failed(fault)
            )
            return waiting
        if fault is not None:
            return that_failed(fault)
        if self.device.type == "cuda":
            return self._submit_cuda(plan)
        return self._reading(self._start(lambda: self._run_rest(plan, self._run_first(plan), None)))

    def draw(self, masks: StepMasks) -> None:
        """The step submitted last goes on to its draws. Never raises for a step's own fault: the handle does."""
        waiting, self._waiting = self._waiting, None
        assert waiting is not None, f"step {masks.step} does not wait for masks"
        waiting.draw(masks)

    def close(self) -> None:
        """Wait for what was submitted and stop the worker thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self, run: Callable[[], T]) -> Deferred[T]:
        """`run`, on the CPU: in the worker thread, or at once."""
        if self._pool is not None:
            return Deferred(self._pool.submit(run).result)
        try:
            done = run()
        except EngineFault as e:
            return that_failed(e)
        return Deferred(lambda: done)

    def _reading(self, started: Deferred[Callable[[], StepResult]]) -> Deferred[StepResult]:
        def read() -> StepResult:
            return started.result()()

        return Deferred(read)

    def _run_first(self, plan: StepPlan) -> Begun:
        try:
            return self._begin(plan)
        except Exception as e:
            raise self._fault(plan, e) from e

    def _run_rest(self, plan: StepPlan, begun: Begun, masks: StepMasks | None) -> Callable[[], StepResult]:
        """The rest of a step on the CPU; what reads its result."""
        started = time.perf_counter()
        try:
            launched = self._finish(plan, begun, masks)
        except Exception as e:
            raise self._fault(plan, e) from e
        seconds = begun.seconds + time.perf_counter() - started

        def read() -> StepResult:
            try:
                self._settle(launched)
                return self._result(plan, launched, seconds + launched.again)
            except Exception as e:
                raise self._fault(plan, e) from e

        return read

    def _begin_masked(self, plan: StepPlan) -> Callable[[StepMasks], StepHandle]:
        """The step is under way until its draws; returns what goes on."""
        if self.device.type != "cuda":
            first = self._start(lambda: self._run_first(plan))
            return lambda masks: self._reading(self._start(lambda: self._run_rest(plan, first.result(), masks)))
        begin = torch.cuda.Event(enable_timing=True)
        try:
            with torch.cuda.device(self.device):
                begin.record()
                begun = self._begin(plan)
        except Exception as e:
            fault = self._fault(plan, e)
            fault.__cause__ = e
            return lambda masks: that_failed(fault)
        return lambda masks: self._end_cuda(plan, begin, lambda: self._finish(plan, begun, masks))

    def _submit_cuda(self, plan: StepPlan) -> StepHandle:
        begin = torch.cuda.Event(enable_timing=True)

        def launch() -> Launched:
            begin.record()
            return self._finish(plan, self._begin(plan), None)

        return self._end_cuda(plan, begin, launch)

    def _end_cuda(self, plan: StepPlan, begin: torch.cuda.Event, launch: Callable[[], Launched]) -> StepHandle:
        """`launch` queues the step, or the rest of it."""
        end = torch.cuda.Event(enable_timing=True)
        try:
            with torch.cuda.device(self.device):  # the current device is a thread's own, and any thread may submit
                launched = launch()
                end.record()
                launched.end = end
        except Exception as e:
            fault = self._fault(plan, e)
            fault.__cause__ = e
            return that_failed(fault)

        def wait() -> StepResult:
            try:
                self._settle(launched)
                end.synchronize()
                result = self._result(plan, launched, begin.elapsed_time(end) / 1e3)
                self.state.host.give_back(launched.lent)
                return result
            except Exception as e:
                raise self._fault(plan, e) from e

        return Deferred(wait)

    @torch.inference_mode()
    def _begin(self, plan: StepPlan) -> Begun:
        """Queue the step on the device until its draws: copies of blocks, inputs and forward pass."""
        started = time.perf_counter()
        if plan.continued:
            self._copies.copy(self.state.block_copies(plan))
        if plan.copies_out or plan.copies_in:
            if self._swap is None:
                raise EngineFault("the plan copies blocks to or from the host, where there are none")
            self._swap.copy(plan.copies_out, plan.copies_in, self.state.host)
        flat = self.state.flatten(plan)
        rows = self.state.sampling.prompt_rows(plan)
        if self._lost:
            for slot in (*plan.removed, *(new.slot for new in plan.added)):
                self._lost.pop(slot, None)
        begun = self.passes.begin(flat, rows)
        begun.seconds = time.perf_counter() - started
        return begun

    @torch.inference_mode()
    def _finish(self, plan: StepPlan, begun: Begun, masks: StepMasks | None) -> Launched:
        """Queue the rest: draw, token table, copy to the host. Or, where there was no memory, the step in parts."""
        part = self.passes.end(begun, masks)
        launched = Launched([] if part is None else [part], self.state.host.take())
        if begun.outcome is None or not self._waits:
            self._complete(plan, begun, masks, launched)
        else:
            launched.settle = partial(self._complete, plan, begun, masks, launched)
            self._open = launched
        return launched

    def _settle_last(self, plan: StepPlan) -> EngineFault | None:
        """Ahead of `plan` the step before it is settled; why that failed."""
        if not self._waits or self._open is None:
            return None
        try:
            self._settle(self._open)
        except Exception as e:
            fault = self._fault(plan, e)
            fault.__cause__ = e
            return fault
        return None

    @torch.inference_mode()
    def _settle(self, launched: Launched) -> None:
        """Nothing of a step is left to do but to wait for the device; ahead of all that comes after it."""
        if launched.settle is not None:
            settle, launched.settle, self._open = launched.settle, None, None
            began = time.perf_counter()
            try:
                with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                    settle()
            except Exception as e:
                launched.fault = e
            launched.again = time.perf_counter() - began
        if launched.fault is not None:
            raise launched.fault

    def _complete(self, plan: StepPlan, begun: Begun, masks: StepMasks | None, launched: Launched) -> None:
        if self.passes.failed(begun):
            launched.parts, launched.cut = self._launch_in_parts(plan, begun, masks), True
            launched.lent += self.state.host.take()
            if launched.end is not None:
                launched.end.record()
        if self._lost:
            launched.lost = {run.slot: self._lost[run.slot] for run in plan.scheduled if run.slot in self._lost}

    def _launch_in_parts(self, plan: StepPlan, begun: Begun, masks: StepMasks | None) -> list[Part]:
        """A step for which there was no memory as a whole, from its beginning."""
        where = f"rank {self.rank}, step {plan.step}"
        log.warning("%s (%d sequences, %d tokens) is out of memory and runs in halves: %s", where, len(plan.scheduled),
                    plan.num_tokens, begun.why)  # fmt: skip
        self._free_spare_memory()
        self.state.change_again(begun.flat)
        done: list[Part] = []
        waiting = [self.state.order(plan)]
        failed = begun  # the whole was tried already
        first = True
        while waiting:
            runs = self._without_lost(waiting.pop())
            if runs and not first:
                part = in_step_order(runs)
                failed = self.passes.begin(self.state.flatten_again(plan.step, part), rows_of(part, begun.rows))
                drawn = self.passes.end(failed, masks)
                if not self.passes.failed(failed) and drawn is not None:
                    done.append(drawn)
                    continue
                self._free_spare_memory()
            first = False
            pieces = halves(runs) if runs else ()
            if pieces is None:
                why = f"out of memory for a single token: {failed.why}"
                log.error("%s: slot %d, whose request fails, is %s", where, runs[0].slot, why)
                self._lost[runs[0].slot] = f"{where}: {why}"
                self._without_lost(runs)
            else:
                waiting += reversed(pieces)
        return done

    def _without_lost(self, runs: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Those whose sequences have memory. What the others would have stored is NaN, so that nobody who shares their
        blocks takes it for keys and values: such a sequence ends with a fault.
        """
        kept = [run for run in runs if run.slot not in self._lost]
        for run in runs:
            if run.slot in self._lost:
                places = self.state.places(run)
                for cache in self.caches:
                    for tensor in (cache.key, cache.value):
                        tensor.view(-1, *tensor.shape[2:]).index_fill_(0, places, torch.nan)
        return kept

    def _free_spare_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _result(self, plan: StepPlan, launched: Launched, seconds: float) -> StepResult:
        parts = launched.parts
        prompts = tuple([one.read() for part in parts for one in part.prompts])
        if not self.passes.collect:
            return StepResult(plan.step, (), seconds, cut=launched.cut)
        if not launched.cut and not launched.lost:
            return StepResult(plan.step, read_part(parts[0]), seconds, prompts)
        found = {result.slot: result for part in parts for result in read_part(part)}
        found |= {slot: SlotResult(slot, (), fault=why) for slot, why in launched.lost.items()}
        slots = tuple(found[run.slot] for run in plan.scheduled if run.emit)
        return StepResult(plan.step, slots, seconds, prompts, launched.cut)

    def _fault(self, plan: StepPlan, error: Exception) -> EngineFault:
        where = f"rank {self.rank}, step {plan.step} ({len(plan.scheduled)} sequences, {plan.num_tokens} tokens)"
        if is_out_of_memory(error):
            return OutOfMemory(f"{where}: {error}; lower cache_fraction or max_num_batched_tokens")
        text = str(error) if isinstance(error, EchelonError) else f"{type(error).__name__}: {error}"
        return EngineFault(f"{where}: {text}")
