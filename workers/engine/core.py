"""`Engine`: requests in, deltas out, one step at a time. No thread and no I/O of its own: the caller calls `step`.

With `step_ahead` the plan of step N+1 is submitted before the result of step N is awaited, so that the device never
waits for the host. A decode is then planned by its position alone; the ranks put the token there themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.api.config import EngineConfig
from workers.api.errors import EngineFault, InvalidRequest
from workers.api.ordering import Ordering
from workers.api.replica import CacheNews, LoadReport
from workers.api.request import Delta, EngineRequest, FinishReason
from workers.engine.beams import BeamSearches
from workers.engine.commit import Committer
from workers.engine.cost import StepCost
from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState
from workers.engine.ledger import check_ledgers
from workers.engine.mask_jobs import MaskedRow, MaskJobs
from workers.engine.plan import Executor, StepHandle
from workers.engine.roster import Roster
from workers.engine.scheduler import PlannedStep, Scheduler
from workers.engine.sequence import Phase, Sequence
from workers.engine.stop import validate
from workers.engine.turn_scheduler import TurnScheduler

_PATIENCE = 0.5  # of a step's time: so long masks cost nothing, since the device is at its forward pass
_LEAST_PATIENCE = 5e-4  # seconds
_BETWEEN_ARRIVALS = 1 << 32  # numbers for all sequences that a beam search may ever have


@dataclass(slots=True)
class _InFlight:
    """A submitted step. What was drawn in slots that were `put_off` does not count."""

    step: PlannedStep
    handle: StepHandle
    put_off: frozenset[int] = frozenset()


class Engine:
    """The step loop over an executor. Not thread-safe: one thread submits, aborts and steps.

    `num_blocks` blocks of `config.block_size` tokens are the pool. The context is `max_model_len` tokens or the
    pool's, whichever is less, so that every accepted request can run to its end alone. `watermark` is the room, in
    tokens, that admission leaves for each resident to grow. `ordering` says who runs (None: first come, first served)
    by `clock` (seconds) and by what steps cost, which is learned from those that ran. Without `grammars` requests that
    have one are refused. What is evicted goes to `num_host_blocks` blocks of host memory. Prompts of over
    `prompts_apart_from` tokens share blocks only with those of their own length (None: with all).
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int | None = None,
        grammars: Grammars | None = None,
        ordering: Ordering | None = None,
        clock: Callable[[], float] = time.monotonic,
        watermark: int = 64,
        num_host_blocks: int = 0,
        prompts_apart_from: int | None = None,
    ) -> None:
        self.config = config
        self.max_model_len = min(max_model_len, num_blocks * config.block_size)
        self.ordering = ordering
        self.roster = Roster(config, num_blocks, ordering, num_host_blocks, prompts_apart_from)
        self.stats = self.roster.stats
        self._cost: StepCost | None = None
        self._scheduler: Scheduler
        if ordering is None:
            self._scheduler = Scheduler(self.roster, config.max_num_batched_tokens, watermark)
        else:
            self._cost = StepCost()
            self._scheduler = TurnScheduler(self.roster, config.max_num_batched_tokens, watermark, ordering, self._cost)
        self._committer = Committer(self.roster)
        self._beams = BeamSearches(self.roster, self.max_model_len)
        self._executor = executor
        self._vocab_size = vocab_size
        self.grammars = grammars
        self._masks = None if grammars is None else MaskJobs(grammars)
        self._clock = clock
        self._outbox: list[Delta] = []
        self._in_flight: _InFlight | None = None
        self._arrivals = 0
        self._failure: str | None = None

    def submit(self, request: EngineRequest) -> None:
        """The request waits for a slot; its deltas come from `step`, the last of them with `finish`.

        Raises InvalidRequest or ContextLengthExceeded, and EngineFault after a failed step; then nothing has changed.
        """
        if self._failure is not None:
            raise EngineFault(self._failure)
        if request.id in self.roster.live or request.id in self._beams:
            raise InvalidRequest(f"request id {request.id[:64]!r} is in use", param="id")
        validate(request, self.max_model_len, self._vocab_size)
        grammar = self._grammar_of(request)
        arrival, since = self._arrivals, self._clock() - request.age
        self._arrivals += _BETWEEN_ARRIVALS
        if request.beams is not None:
            self._beams.begin(request, arrival, since)
            return
        sequence = Sequence(request, arrival, self.max_model_len, self.roster.flow(request), grammar)
        self.roster.add(sequence, since)

    def abort(self, request_id: str) -> None:
        """The request's blocks and slot are free; the next `step` hands out its last delta. Unknown ids are ignored.

        Of a beam search, the ids of its answers stand for it.
        """
        sequence = self.roster.live.get(request_id)
        if sequence is not None and not sequence.is_part:
            self._outbox.append(self.roster.finish(sequence, FinishReason.ABORT))
        elif request_id in self._beams:
            self._outbox += self._beams.end(request_id, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to hand out."""
        return bool(self.roster.live or self._outbox or self._in_flight)

    def step(self) -> list[Delta]:
        """Submit at most one step and commit at most one; returns the deltas that are ready, in order.

        Raises EngineFault (or whatever the executor raised) when the step as a whole failed. The engine is failed from
        then on: nothing runs, `submit` refuses, and `fail_all` gives every live request its terminal delta.
        """
        if self._failure is not None and self.roster.live:
            raise EngineFault(self._failure)
        try:
            self._advance()
        except Exception as error:
            self._failure = f"a step failed: {error}"
            self._in_flight = None
            raise
        return self._hand_out()

    def fail_all(self, message: str) -> list[Delta]:
        """Every live request has ended with FinishReason.ERROR; returns their terminal deltas, after those not yet
        handed out. An engine that had not failed stays usable.
        """
        self._outbox += self._beams.fail_all(message)
        for sequence in list(self.roster.live.values()):
            self._outbox.append(self.roster.finish(sequence, FinishReason.ERROR, error=message))
        return self._hand_out()

    def load(self) -> LoadReport:
        """The state after the last step."""
        roster, stats = self.roster, self.stats
        under_way = None if self._in_flight is None else self._in_flight.step
        return LoadReport(
            step=stats.steps,
            step_seconds=stats.step_seconds,
            prefill_tokens=stats.step_prefill,
            decode_tokens=stats.step_decode,
            overhead_tokens=stats.step_overhead,
            running=len(roster.residents),
            waiting=len(roster.queue),
            prefill_backlog=roster.backlog,
            kv_tokens=roster.residents.kv_tokens,
            free_blocks=roster.pool.num_available,
            total_blocks=roster.pool.num_blocks,
            preemptions=stats.preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            executed_tokens=stats.executed,
            requests=stats.requests(roster.num_requests),
            steps_cut=stats.steps_cut,
            planned_prefill=0 if under_way is None else under_way.num_tokens - under_way.num_decodes,
            planned_decode=0 if under_way is None else under_way.num_decodes,
            host_blocks=len(roster.host),
            total_host_blocks=roster.host.num_blocks,
            copied_out=roster.host.copied_out,
            copied_in=roster.host.copied_in,
            host_hits=stats.host_hits,
        )

    def cache_news(self, most: int) -> CacheNews | None:
        """What the prefix cache gained and lost since the last call, at most `most` blocks of it; None if nothing."""
        return self.roster.cache.journal.take(most)

    def tell_cache_anew(self) -> None:
        """The next `cache_news` begin from nothing: somebody new listens."""
        self.roster.cache.journal.begin_anew()

    def check_ledgers(self) -> None:
        """Raises AssertionError, with what is wrong, unless every block and every request is accounted for."""
        check_ledgers(self.roster)

    def _advance(self) -> None:
        if self._failure is not None:
            return
        began = self._clock()
        waited = 0.0
        previous, self._in_flight = self._in_flight, None
        planned = self._scheduler.plan(began)
        if planned is not None:
            self._in_flight = _InFlight(planned, self._executor.submit(planned.plan))
            self.roster.cache.settle()
            if previous is None:
                self._mask(self._in_flight)
            if not self.config.step_ahead:
                previous, self._in_flight = self._in_flight, None
        if previous is not None:
            asked = self._clock()
            result = previous.handle.result()
            waited = self._clock() - asked
            deltas = self._committer.commit(previous.step, result, previous.put_off)
            self._outbox += self._beams.take(deltas) if self._beams else deltas
            if self._cost is not None:
                step = previous.step
                prefill = step.num_tokens - step.num_decodes
                self._cost.observe(result.seconds, prefill, step.num_decodes, step.kv_tokens, step.pairs)
            if self._in_flight is not None:
                self._mask(self._in_flight)  # while the device is at its forward pass
        self.stats.wait_seconds += waited
        self.stats.host_seconds += self._clock() - began - waited

    def _mask(self, in_flight: _InFlight) -> None:
        """The masks of a step, now that the tokens before its draws are known; who waits for his is put off."""
        step, plan = in_flight.step, in_flight.step.plan
        if not plan.masked:
            return
        assert self._masks is not None, "a sequence has a grammar that nobody compiled"
        masked = set(plan.masked)
        rows: list[MaskedRow] = []
        sequences: dict[int, Sequence] = {}
        for i, (s, run) in enumerate(zip(step.sequences, plan.scheduled, strict=True)):
            if run.slot not in masked:
                continue
            state = None if s.phase is Phase.FINISHED else s.grammar
            new = s.token_ids[s.num_prompt + state.count :] if state is not None and state.job is None else ()
            rows.append(MaskedRow(run.slot, state, new, can_wait=i < step.num_decodes))
            sequences[run.slot] = s
        patience = max(_LEAST_PATIENCE, _PATIENCE * self.stats.step_seconds)
        alone = len(masked) == sum(run.emit for run in plan.scheduled)
        masks, in_flight.put_off = self._masks.masks(plan.step, rows, patience=patience, alone=alone)
        for slot in in_flight.put_off:
            self.roster.put_off(sequences[slot])
        self._executor.draw(masks)

    def _grammar_of(self, request: EngineRequest) -> GrammarState | None:
        spec, sampling = request.grammar, request.sampling
        if spec is None:
            return None
        if self.grammars is None:
            raise InvalidRequest("this model takes no structured output", param="response_format")
        room = min(sampling.max_tokens, self.max_model_len - len(request.prompt_ids))
        return self.grammars.state(spec, sampling.stop_ids, sampling.min_tokens, room)

    def _hand_out(self) -> list[Delta]:
        deltas, self._outbox = self._outbox, []
        return deltas
