"""`Runner`: runs plans on one rank's device (the engine's `Executor`).

On CUDA a submitted step is queued on the stream and the host goes on; the drawn tokens are copied to pinned memory
behind an event, and nothing else waits. After `capture`, steps that fit a captured shape are replayed. On the CPU a
step runs in one worker thread, or at once in `submit`.

A step that is out of memory is run in halves, one after the other, and these in halves, before the next step begins:
who planned it sees but a slower one. A sequence that finds no room for a single token ends with a fault; the others go
on.

Shapes: T tokens, E emitting rows, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from workers.api.errors import EchelonError, EngineFault, OutOfMemory
from workers.api.request import TokenLogprobs
from workers.context import ForwardContext, LayerCache, forward_context
from workers.engine.plan import ScheduledSequence, SlotResult, StepHandle, StepPlan, StepResult
from workers.execution.flat import FlatStep
from workers.execution.graphs import CapturedStep, StepGraphs
from workers.execution.halving import halves, in_step_order, is_out_of_memory, rows_of
from workers.execution.inputs import BatchState, StepInputs
from workers.execution.prompt_scores import PromptScores, score_prompts
from workers.execution.sampler import FAULTS, Logprobs, Sampled, sample_own
from workers.execution.sampling_state import GREEDY, PromptRows, SamplingBatch, WantedLogprobs
from workers.models.base import CausalModel
from workers.parallel.group import Group

log = logging.getLogger("echelon.runner")


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step, or a part of one, has drawn: it lies on the host, or will once the step's event has happened."""

    emit_slots: tuple[int, ...]
    wanted: WantedLogprobs | None
    sampled: Sampled | None
    prompts: Sequence[PromptScores] = ()


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way. `cut`: it did not run as a whole; `lost`: of its slots, those that have no memory, and why;
    `lent`: its host buffers.
    """

    parts: list[_Part]
    cut: bool
    lost: dict[int, str]
    lent: list[torch.Tensor]


class _Deferred:
    """A handle whose result is made when it is asked for, once."""

    def __init__(self, make: Callable[[], StepResult]) -> None:
        self._make: Callable[[], StepResult] | None = make
        self._outcome: StepResult | EngineFault | None = None
        self._lock = threading.Lock()

    def result(self) -> StepResult:
        """See `StepHandle`."""
        with self._lock:
            if self._make is not None:
                make, self._make = self._make, None
                try:
                    self._outcome = make()
                except EngineFault as e:
                    self._outcome = e
        if isinstance(self._outcome, EngineFault):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Runner:
    """Runs the plans of one engine, in order. `caches` has an entry a layer.

    `threaded` (CPU only): a worker thread runs the steps, so that the caller may plan the next one meanwhile.
    `collect`: whether results are brought to the host; ranks other than 0 leave that to rank 0.
    `halves`: whether a step that is out of memory is run in parts. Not with several ranks, which must run the same.
    """

    def __init__(
        self,
        model: CausalModel,
        caches: Sequence[LayerCache],
        state: BatchState,
        *,
        rank: int = 0,
        threaded: bool = False,
        collect: bool = True,
        halves: bool = True,
    ) -> None:
        self.model, self.caches, self.state = model, tuple(caches), state
        self.rank, self.device, self._collect, self._halves = rank, state.device, collect, halves
        self._lost: dict[int, str] = {}  # slots whose sequence had no memory, until they are somebody else's
        self._graphs: StepGraphs | None = None
        self._pool = (
            ThreadPoolExecutor(1, thread_name_prefix=f"echelon-rank{rank}")
            if threaded and self.device.type == "cpu"
            else None
        )

    def capture(self, max_num_batched_tokens: int, group: Group) -> None:
        """CUDA only: from now on steps are replayed where they can be. Waits for the device; takes seconds.

        All ranks of `group` at once, with the same arguments. Raises OutOfMemory.
        """
        graphs = StepGraphs(self.model, self.caches, self.state, max_num_batched_tokens, group)
        try:
            graphs.capture()
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(f"rank {self.rank}: no room for CUDA graphs: {e}; lower cache_fraction") from e
        self._graphs = graphs

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Never raises for a step's own fault: the handle does."""
        if self.device.type == "cuda":
            return self._submit_cuda(plan)
        if self._pool is not None:
            future: Future[StepResult] = self._pool.submit(self._run, plan)
            return _Deferred(future.result)
        try:
            done = self._run(plan)
        except EngineFault as e:
            fault = e

            def fail() -> StepResult:
                raise fault

            return _Deferred(fail)
        return _Deferred(lambda: done)

    def close(self) -> None:
        """Wait for what was submitted and stop the worker thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _run(self, plan: StepPlan) -> StepResult:
        """A whole step on the CPU."""
        started = time.perf_counter()
        try:
            launched = self._launch(plan)
            return self._result(plan, launched, time.perf_counter() - started)
        except Exception as e:
            raise self._fault(plan, e) from e

    def _submit_cuda(self, plan: StepPlan) -> StepHandle:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with torch.cuda.device(self.device):  # the current device is a thread's own, and any thread may submit
                begin.record()
                launched = self._launch(plan)
                end.record()
        except Exception as e:
            fault = self._fault(plan, e)
            fault.__cause__ = e

            def fail() -> StepResult:
                raise fault

            return _Deferred(fail)

        def wait() -> StepResult:
            try:
                end.synchronize()
                result = self._result(plan, launched, begin.elapsed_time(end) / 1e3)
                self.state.host.give_back(launched.lent)
                return result
            except Exception as e:
                raise self._fault(plan, e) from e

        return _Deferred(wait)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> _Launched:
        """Queue the step on the device: inputs, forward, draw, token table, copy to the host."""
        flat = self.state.flatten(plan)
        rows = self.state.sampling.prompt_rows(plan)
        if self._lost:
            for slot in (*plan.removed, *(new.slot for new in plan.added)):
                self._lost.pop(slot, None)
        why: str | None = None
        try:
            parts = [self._launch_part(flat, rows)]
        except Exception as e:
            if not (self._halves and is_out_of_memory(e)):
                raise
            why = str(e)
        if why is not None:  # not in the handler: the error holds on to the frames in which the step's tensors are
            parts = self._launch_in_parts(plan, flat, rows, why)
        lost: dict[int, str] = {}
        if self._lost:
            lost = {run.slot: self._lost[run.slot] for run in plan.scheduled if run.slot in self._lost}
        return _Launched(parts, why is not None, lost, self.state.host.take())

    def _launch_in_parts(self, plan: StepPlan, flat: FlatStep, rows: Sequence[PromptRows], why: str) -> list[_Part]:
        """`_launch` of a step for which there was no memory as a whole."""
        where = f"rank {self.rank}, step {plan.step}"
        log.warning("%s (%d sequences, %d tokens) is out of memory and runs in halves: %s", where, len(plan.scheduled),
                    plan.num_tokens, why)  # fmt: skip
        self._free_spare_memory()
        self.state.change_again(flat)
        done: list[_Part] = []
        waiting = [self.state.order(plan)]
        failed = True  # the whole was tried already
        while waiting:
            runs = self._without_lost(waiting.pop())
            if runs and not failed:
                part = in_step_order(runs)
                try:
                    done.append(self._launch_part(self.state.flatten_again(plan.step, part), rows_of(part, rows)))
                    continue
                except Exception as e:
                    if not is_out_of_memory(e):
                        raise
                    why = str(e)
                self._free_spare_memory()
            failed = False
            pieces = halves(runs) if runs else ()
            if pieces is None:
                log.error("%s: no memory for one token of slot %d, whose request fails: %s", where, runs[0].slot, why)
                self._lost[runs[0].slot] = f"{where}: out of memory for a single token: {why}"
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

    def _launch_part(self, flat: FlatStep, rows: Sequence[PromptRows]) -> _Part:
        """A step, or a part of one, of which log-probabilities of prompts are wanted at `rows`."""
        captured = None if self._graphs is None or rows else self._graphs.find(flat)
        prompts: Sequence[PromptScores] = ()
        if captured is None:
            sampling, sampled, prompts = self._run_eagerly(self.state.upload(flat), rows)
        else:
            sampling, sampled = self._replay(captured, flat)
        if sampled is None or not self._collect:
            return _Part((), None, None, prompts if self._collect else ())
        return _Part(tuple(flat.emit_slots.tolist()), sampling.logprobs, self._to_host(sampled), prompts)

    def _run_eagerly(
        self, inputs: StepInputs, rows: Sequence[PromptRows]
    ) -> tuple[SamplingBatch, Sampled | None, Sequence[PromptScores]]:
        """`rows`: those of which log-probabilities of the prompt are wanted; the last thing returned."""
        context = ForwardContext((inputs.attention,) * len(self.caches), self.caches)
        table, logits_of = self.state.token_table, self.model.compute_logits
        with forward_context(context):
            hidden = self.model(inputs.input_ids, inputs.positions)
            prompts = score_prompts(hidden, rows, table, logits_of, self._bring) if rows else ()
            if not len(inputs.emit_at):
                return GREEDY, None, prompts
            if inputs.emit_index is not None:
                hidden = hidden.index_select(0, inputs.emit_index)
            own = self.model.own_logits(hidden)
        sampled = sample_own(self.model, own, inputs.sampling, table)
        self.state.write_tokens(inputs.emit_at, sampled.tokens)
        return inputs.sampling, sampled, prompts

    def _replay(self, captured: CapturedStep, flat: FlatStep) -> tuple[SamplingBatch, Sampled | None]:
        """The captured draw is greedy. Where more is asked for, its tokens are replaced before anything reads them."""
        sampling = self.state.upload_changes(flat)
        captured.replay(flat)
        emits, step = len(flat.emit_at), captured.step
        if not emits:
            return sampling, None
        if sampling is GREEDY:
            return sampling, Sampled(step.tokens[:emits])
        sampled = sample_own(self.model, step.own_logits[:emits], sampling, self.state.token_table)
        self.state.write_tokens(step.inputs.on_device["emit_at"][:emits], sampled.tokens)
        return sampling, sampled

    def _to_host(self, sampled: Sampled) -> Sampled:
        if self.device.type == "cpu":
            return sampled
        extra = sampled.logprobs
        bring = self._bring
        return Sampled(
            bring(sampled.tokens),
            None if extra is None else Logprobs(*map(bring, (extra.chosen, extra.rank, extra.top, extra.top_ids))),
        )

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy to the host, under way; on the CPU the tensor itself."""
        if self.device.type == "cpu":
            return tensor
        host = self.state.host.lend(tensor.numel(), tensor.dtype)
        return host.view(tensor.shape).copy_(tensor, non_blocking=True)

    def _result(self, plan: StepPlan, launched: _Launched, seconds: float) -> StepResult:
        parts = launched.parts
        prompts = tuple([one.read() for part in parts for one in part.prompts])
        if not launched.cut and not launched.lost:
            return StepResult(plan.step, _read(parts[0]), seconds, prompts)
        found = {result.slot: result for part in parts for result in _read(part)}
        found |= {slot: SlotResult(slot, (), fault=why) for slot, why in launched.lost.items()}
        slots = tuple(found[run.slot] for run in plan.scheduled if run.emit)
        return StepResult(plan.step, slots, seconds, prompts, launched.cut)

    def _fault(self, plan: StepPlan, error: Exception) -> EngineFault:
        where = f"rank {self.rank}, step {plan.step} ({len(plan.scheduled)} sequences, {plan.num_tokens} tokens)"
        if is_out_of_memory(error):
            return OutOfMemory(f"{where}: {error}; lower cache_fraction or max_num_batched_tokens")
        text = str(error) if isinstance(error, EchelonError) else f"{type(error).__name__}: {error}"
        return EngineFault(f"{where}: {text}")


def _read(part: _Part) -> tuple[SlotResult, ...]:
    sampled, wanted = part.sampled, part.wanted
    if sampled is None:
        return ()
    tokens = sampled.tokens.tolist()
    logprobs: dict[int, TokenLogprobs] = {}
    if sampled.logprobs is not None and wanted is not None:
        logprobs = _read_logprobs(tokens, sampled.logprobs, wanted)
    return tuple(
        SlotResult(slot, (token,), (logprobs[row],) if row in logprobs else ())
        if token >= 0
        else SlotResult(slot, (), fault=FAULTS[token])
        for row, (slot, token) in enumerate(zip(part.emit_slots, tokens, strict=True))
    )


def _read_logprobs(tokens: list[int], values: Logprobs, wanted: WantedLogprobs) -> dict[int, TokenLogprobs]:
    """By row of the step."""
    chosen, rank = values.chosen.tolist(), values.rank.tolist()
    top, top_ids = values.top.tolist(), values.top_ids.tolist()
    return {
        row: TokenLogprobs(tokens[row], chosen[n], rank[n], tuple(zip(top_ids[n][:count], top[n][:count], strict=True)))
        for n, (row, count) in enumerate(zip(wanted.host_rows, wanted.counts, strict=True))
    }
