"""Which sequences run in a step (`plan`), and what follows from what was drawn (`commit`). Pure: no clock, no I/O.

Continuous batching after Yu et al., "Orca", OSDI'22; prefill in chunks beside decodes after Agrawal et al.,
"Sarathi-Serve", OSDI'24; preemption by recompute after Kwon et al., SOSP'23.

The order inside a step: decodes, then part-done prefills, then admissions in the order of the queue. Room is made
before anything is planned, so a sequence of the plan is never preempted by it.

Progress. A request fits the pool alone (checked at its submission); the last of the victims' order is preempted only
if it is alone, which it never must be. Admission leaves `watermark` tokens of room for each resident, and
twice as many each time the sequence had to be preempted. So one sequence is preempted at most about log2(pool /
watermark) + 1 times under FIFO: at the end it is let in alone, and then the oldest, which nobody preempts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workers.api.config import EngineConfig
from workers.api.errors import EngineFault
from workers.api.request import Delta, FinishReason, TokenLogprobs
from workers.engine.block_pool import BlockPool
from workers.engine.plan import NewSequence, ScheduledSequence, SlotResult, StepPlan, StepResult
from workers.engine.prefix_cache import PrefixCache
from workers.engine.queue import Charge, Ordering, Rank, WaitingQueue
from workers.engine.residents import Residents
from workers.engine.sequence import Phase, Sequence
from workers.engine.stats import Stats
from workers.engine.stop import finish_reason


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan, and whose `plan.scheduled` entries those are."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Plans and commits in turn; at most one planned step may be uncommitted while the next is planned."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, ordering: Ordering, stats: Stats, *, watermark: int = 64
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, config.block_size, enabled=config.prefix_caching)
        self.residents = Residents(self.pool, self.cache, config.block_size, config.max_num_seqs)
        self.queue = WaitingQueue(ordering)
        self.stats = stats
        self.backlog = 0  # known tokens not yet planned, of waiting and prefilling sequences
        self._ordering = ordering
        self._budget = config.max_num_batched_tokens
        self.block_size = config.block_size
        self._watermark = watermark
        self._next_step = 0
        self._uncommitted = 0  # steps

    def add(self, sequence: Sequence) -> None:
        """It waits for a slot."""
        self.backlog += len(sequence.token_ids)
        self.queue.push(sequence)

    # ------------------------------------------------------------------ plan

    def plan(self) -> PlannedStep | None:
        """The next step, its blocks taken and its slots given; None if nothing can run while one is in flight."""
        residents = self.residents
        decodes, preempted = self._make_room()
        sequences, scheduled = self._plan_decodes(decodes)
        budget = self._budget - len(scheduled)
        longer: list[tuple[Sequence, ScheduledSequence]] = []
        for sequence in self._by_rank(residents.prefilling):
            budget -= self._plan_chunk(sequence, budget, longer)
        added = self._admit(budget, longer) if not preempted else []
        for sequence, run in longer:  # chunks of one token are decodes to the ranks
            if run.count == 1:
                sequences.append(sequence)
                scheduled.append(run)
        for sequence, run in longer:
            if run.count > 1:
                sequences.append(sequence)
                scheduled.append(run)
        if not scheduled:
            if self._uncommitted or not len(residents):
                return None
            # Part-done prefills hold every block and the ordering's ranks disagree on who yields.
            self.preempt(max(residents, key=self._victim_rank))
            return self.plan()
        self._uncommitted += 1
        plan = StepPlan(self._next_step, residents.take_removed(), tuple(added), tuple(scheduled))
        self._next_step += 1
        return PlannedStep(plan, tuple(sequences))

    def _plan_decodes(self, decodes: Iterable[Sequence]) -> tuple[list[Sequence], list[ScheduledSequence]]:
        residents, mask = self.residents, self.block_size - 1
        take = self.pool.take
        sequences: list[Sequence] = []
        scheduled: list[ScheduledSequence] = []
        for sequence in decodes:
            start = sequence.planned
            new_blocks: tuple[int, ...] = ()
            if not start & mask:
                new_blocks = (take(),)
                sequence.blocks.append(new_blocks[0])
            sequence.planned = start + 1
            sequence.pending += 1
            if start + 2 >= sequence.limit:  # with the token drawn now
                residents.move(sequence, Phase.ENDING)
            sequences.append(sequence)
            scheduled.append(ScheduledSequence(sequence.slot, start, 1, 1, new_blocks))
        residents.kv_tokens += len(scheduled)
        return sequences, scheduled

    def _plan_chunk(self, sequence: Sequence, budget: int, out: list[tuple[Sequence, ScheduledSequence]]) -> int:
        """As much of its known tokens as budget and blocks allow; returns their number."""
        start, total = sequence.planned, len(sequence.token_ids)
        room = (len(sequence.blocks) + self.pool.num_available) * self.block_size - start
        count = min(total - start, budget, room)
        if count <= 0:
            return 0
        new_blocks = self.residents.grow(sequence, count)
        self.backlog -= count
        emit = int(start + count == total)
        if emit:
            sequence.pending += 1
            self.residents.move(sequence, Phase.ENDING if total + 1 >= sequence.limit else Phase.DECODE)
        out.append((sequence, ScheduledSequence(sequence.slot, start, count, emit, new_blocks)))
        return count

    def _admit(self, budget: int, out: list[tuple[Sequence, ScheduledSequence]]) -> list[NewSequence]:
        added: list[NewSequence] = []
        residents, stats = self.residents, self.stats
        while budget > 0 and residents.free_slots:
            sequence = self.queue.peek()
            if sequence is None:
                break
            hits = self._fit(sequence)
            if hits is None:
                break
            self.queue.pop()
            added.append(residents.enter(sequence, hits))
            found = sequence.planned
            self.backlog -= found
            if not sequence.preemptions:
                stats.prefix_queries += len(sequence.token_ids)
                stats.prefix_hits += found
            if found > sequence.accounted:
                prompt = sequence.num_prompt
                sequence.cached += min(found, prompt) - min(sequence.accounted, prompt)
                sequence.accounted = found
            budget -= self._plan_chunk(sequence, budget, out)
        return added

    def _fit(self, sequence: Sequence) -> list[int] | None:
        """Its prefix hits, if there is room for its rest, for unfinished prompts and for what residents may add."""
        residents, pool = self.residents, self.pool
        if not len(residents):
            return self.cache.match(sequence)
        headroom = self._watermark
        if sequence.preemptions:
            headroom = max(headroom, 1) << min(sequence.preemptions, 32)
        reserved = residents.blocks_for(headroom * len(residents))
        for other in residents.prefilling:
            reserved += residents.blocks_for(len(other.token_ids)) - len(other.blocks)
        if reserved >= pool.num_available:
            return None
        hits = self.cache.match(sequence)
        idle = sum(1 for block in hits if not pool.refs(block))  # counted as available, but not to be taken
        own = residents.blocks_for(len(sequence.token_ids)) - len(hits)
        return hits if reserved + own <= pool.num_available - idle else None

    # ------------------------------------------------------------------ room

    def _make_room(self) -> tuple[list[Sequence], bool]:
        """The decodes that run, so that each finds its block, and whether anybody was preempted for it.

        While a sequence is about to end, nobody is preempted: decodes without a block wait for the step in flight.
        """
        residents, pool, mask = self.residents, self.pool, self.block_size - 1
        decodes = list(residents.decoding)
        short = sum([1 for s in decodes if not s.planned & mask]) - pool.num_available
        if short > 0 and residents.ending:
            hungry = sorted((s for s in decodes if not s.planned & mask), key=self._victim_rank)
            left_out = set(hungry[-short:])
            return [s for s in decodes if s not in left_out], False
        preempted = False
        while short > 0:
            self.preempt(max((*residents.decoding, *residents.prefilling), key=self._victim_rank))
            preempted = True
            short = sum([1 for s in residents.decoding if not s.planned & mask]) - pool.num_available
        if residents.prefilling and not residents.ending:
            preempted |= self._make_room_for_prefill(-short)
        return (list(residents.decoding) if preempted else decodes), preempted

    def _make_room_for_prefill(self, spare: int) -> bool:
        """The first part-done prefill finds a block for its next token, if those who should yield to it hold one.

        `spare` blocks are left over by the decodes.
        """
        residents, mask = self.residents, self.block_size - 1
        preempted = False
        while residents.prefilling and spare <= 0:
            first = self._by_rank(residents.prefilling)[0]
            if first.planned & mask:
                break
            victim = max((*residents.decoding, *residents.prefilling), key=self._victim_rank)
            if victim is first:
                break
            self.preempt(victim)
            preempted = True
            spare = self.pool.num_available - sum([1 for s in residents.decoding if not s.planned & mask])
        return preempted

    def preempt(self, sequence: Sequence) -> None:
        """It loses slot and blocks and waits at the head of its flow, to be recomputed from what is known.

        A token of it in flight is still taken when that step is committed.
        """
        if sequence.phase is Phase.PREFILL:
            self.backlog -= len(sequence.token_ids) - sequence.planned
        self.residents.leave(sequence)
        sequence.preemptions += 1
        self.stats.preemptions += 1
        sequence.phase = Phase.WAITING
        self.add(sequence)

    def _victim_rank(self, sequence: Sequence) -> tuple[Rank, int]:
        return self._ordering.victim(sequence.request), sequence.arrival

    def _by_rank(self, sequences: dict[Sequence, None]) -> list[Sequence]:
        if len(sequences) < 2:
            return list(sequences)
        return sorted(sequences, key=lambda s: (self._ordering.rank(s.request), s.arrival))

    # ---------------------------------------------------------------- commit

    def commit(self, step: PlannedStep, result: StepResult) -> list[Delta]:
        """Account for the step, register full blocks, and return what was drawn, one delta a sequence.

        Work for a sequence that has ended meanwhile is overhead. Raises EngineFault if the result is not the plan's.
        """
        _check_result(step.plan, result)
        self._uncommitted -= 1
        answers = iter(result.slots)
        deltas: list[Delta] = []
        charges: list[tuple[Sequence, int, int, int, int]] = []
        prefill = decode = overhead = 0
        block_size = self.block_size
        for sequence, run in zip(step.sequences, step.plan.scheduled, strict=True):
            answer = next(answers) if run.emit else None
            if sequence.phase is Phase.FINISHED:
                overhead += run.count
                continue
            end = run.start + run.count
            charge = _charge(sequence, run.count, end)
            charges.append((sequence, *charge))
            prefill += charge[0]
            decode += charge[1]
            overhead += charge[3]
            if sequence.slot >= 0:  # else it was preempted meanwhile: its blocks are gone
                sequence.computed = end
                if end >= (sequence.registered + 1) * block_size:
                    self.cache.register(sequence)
            if answer is not None:
                sequence.pending -= run.emit
                deltas.append(self._take(sequence, answer))
        self.stats.count_step(result.seconds, step.plan.num_tokens, prefill, decode, overhead)
        self._ordering.executed(Charge(s.request, p, d, kv, o) for s, p, d, kv, o in charges)
        return deltas

    def _take(self, sequence: Sequence, answer: SlotResult) -> Delta:
        if answer.fault is not None:
            self.cache.forget(sequence)
            return self.finish(sequence, FinishReason.ERROR, error=answer.fault)
        position = sequence.num_emitted
        reason = None
        for taken, token in enumerate(answer.token_ids, 1):
            sequence.token_ids.append(token)
            if sequence.phase is Phase.WAITING:
                self.backlog += 1
            reason = finish_reason(sequence)
            if reason is not None:
                tokens, logprobs = answer.token_ids[:taken], answer.logprobs[:taken]
                return self.finish(sequence, reason, position=position, token_ids=tokens, logprobs=logprobs)
        return Delta(sequence.id, position, answer.token_ids, answer.logprobs)

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        position: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
    ) -> Delta:
        """It holds and waits for nothing any more; returns its terminal delta. What it has in flight is discarded."""
        if sequence.phase is Phase.WAITING:
            self.backlog -= len(sequence.token_ids)
            sequence.phase = Phase.FINISHED
            self.queue.discard(sequence)
        else:
            if sequence.phase is Phase.PREFILL:
                self.backlog -= len(sequence.token_ids) - sequence.planned
            self.residents.leave(sequence)
            sequence.phase = Phase.FINISHED
        self.stats.count_finish(reason)
        return Delta(
            sequence.id,
            sequence.num_emitted if position is None else position,
            token_ids,
            logprobs,
            reason,
            error,
            sequence.cached,
            sequence.executed_prefill,
            sequence.executed_decode,
        )


def _charge(sequence: Sequence, count: int, end: int) -> tuple[int, int, int, int]:
    """(prefill, decode, KV tokens that decodes read, overhead) of the `count` positions before `end`, each once."""
    first, prompt = sequence.accounted, sequence.num_prompt
    if end <= first:
        return 0, 0, 0, count
    sequence.accounted = end
    prefill = min(end, prompt) - first if first < prompt else 0
    decode = end - first - prefill
    sequence.executed_prefill += prefill
    sequence.executed_decode += decode
    kv_read = decode * (2 * end - decode + 1) // 2  # position p reads p + 1 tokens
    return prefill, decode, kv_read, count - prefill - decode


def _check_result(plan: StepPlan, result: StepResult) -> None:
    if result.step != plan.step:
        raise EngineFault(f"the executor answered step {result.step}, step {plan.step} was next")
    asked, answered = [run.slot for run in plan.scheduled if run.emit], [answer.slot for answer in result.slots]
    if asked != answered:
        raise EngineFault(f"step {plan.step} asked slots {asked}, the executor answered {answered}")
    for answer in result.slots:
        if not answer.token_ids and answer.fault is None:
            raise EngineFault(f"step {plan.step} drew no token for slot {answer.slot}")
