"""Which sequences run in the next step, first come, first served. Pure: no clock, no I/O. Steps that a policy orders
are planned in `workers.engine.turn_scheduler`.

Continuous batching after Yu et al., "Orca", OSDI'22; prefill in chunks beside decodes after Agrawal et al.,
"Sarathi-Serve", OSDI'24; preemption by recompute, or by copies to the host, after Kwon et al., SOSP'23.

The order inside a step: decodes, then part-done prefills, then admissions, each by arrival. Room is made before
anything is planned, so a sequence of the plan is never preempted by it; if anybody must yield, it is the youngest.

Progress. Every accepted request fits the pool alone, and whoever is resident alone always runs. Admission leaves
`watermark` tokens of room for each sequence to grow, and twice as much each time the candidate had been preempted. So
one sequence is preempted at most about 2 + log2(pool / watermark) times: in the end it is let in alone, and is then the
oldest, which nobody preempts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.engine.cost import pairs_of
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.engine.quick import quick
from workers.engine.roster import Roster
from workers.engine.sequence import Phase, Sequence

MOST_NEW_TOKENS = 1 << 19  # of the sequences that a plan adds, but for the last: a plan has a place of 8 MiB on its way

_scheduled = quick(ScheduledSequence)

Run = tuple[Sequence, ScheduledSequence]


@dataclass(slots=True)
class Expected:
    """What a policy expects of a step; None until it has been asked."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan, and whose `plan.scheduled` entries those are. The first `num_decodes` were in phase DECODE before.

    `kv_tokens` are those that the decodes read, where the cost of steps is learned; `pairs` see `pairs_of`.
    """

    plan: StepPlan
    num_tokens: int
    num_decodes: int
    sequences: tuple[Sequence, ...]
    expected: Expected
    kv_tokens: int
    pairs: float


class Scheduler:
    """Plans one step after the other; at most one may be uncommitted when the next is planned."""

    def __init__(self, roster: Roster, max_num_batched_tokens: int, watermark: int) -> None:
        self._roster = roster
        self._residents = roster.residents
        self._pool = roster.pool
        self._block_size = roster.block_size
        self._budget = max_num_batched_tokens
        self._watermark = watermark
        self._next_step = 0

    def plan(self, now: float) -> PlannedStep | None:
        """The next step, its blocks taken and its slots given; None if there is none before something is committed.

        `now`, in seconds, is for policies.
        """
        residents = self._residents
        sequences, preempted = self._make_room()
        scheduled = self._plan_decodes(sequences)
        budget = self._budget - len(scheduled)
        chunks: list[Run] = []
        for sequence in sorted(residents.prefilling, key=_by_arrival):
            budget -= self._plan_chunk(sequence, budget, chunks)
        added: list[NewSequence] = []
        if not preempted:
            budget -= self._admit(budget, chunks, added)
        return self._planned(sequences, scheduled, chunks, added)

    def _planned(
        self,
        sequences: list[Sequence],
        decodes: list[ScheduledSequence],
        chunks: list[Run],
        added: list[NewSequence],
        kv_tokens: int = 0,
    ) -> PlannedStep | None:
        """The step of these `decodes`, of `sequences`, and of `chunks`; None if it is empty."""
        num_decodes = num_tokens = len(decodes)
        pairs = 0.0
        chunks.sort(key=lambda chunk: chunk[1].count > 1)  # to the ranks, a chunk of one token is a decode
        for sequence, run in chunks:
            sequences.append(sequence)
            decodes.append(run)
            num_tokens += run.count
            pairs += pairs_of(run.start, run.count)
        if not decodes:
            return None
        masked = _masked(sequences, decodes) if self._roster.grammars else ()
        removed, copies = self._residents.take_removed(), self._roster.host.take_copies()
        continued = self._residents.take_continued()
        plan = StepPlan(self._next_step, removed, tuple(added), tuple(decodes), masked, *copies, continued)
        self._next_step += 1
        self._roster.in_flight += 1
        return PlannedStep(plan, num_tokens, num_decodes, tuple(sequences), Expected(), kv_tokens, pairs)

    def _plan_decodes(self, decodes: list[Sequence]) -> list[ScheduledSequence]:
        """One position of each: the hot loop of planning."""
        residents, mask, take = self._residents, self._block_size - 1, self._pool.take
        scheduled: list[ScheduledSequence] = []
        for sequence in decodes:
            start = sequence.planned
            sequence.planned = start + 1
            if start & mask or start < len(sequence.blocks) * self._block_size:  # it was put off, and has its block
                scheduled.append(_scheduled(sequence.slot, start, 1, 1))
            else:
                block = take()
                sequence.blocks.append(block)
                scheduled.append(_scheduled(sequence.slot, start, 1, 1, (block,)))
            if start + 2 >= sequence.limit:  # the token that is drawn now included
                residents.move(sequence, Phase.ENDING)
        residents.kv_tokens += len(scheduled)
        return scheduled

    def _plan_chunk(self, sequence: Sequence, budget: int, out: list[Run]) -> int:
        """As many of its known tokens as budget and blocks allow; returns their number."""
        start, total = sequence.planned, len(sequence.token_ids)
        room = (len(sequence.blocks) + self._pool.num_available) * self._block_size - start
        count = min(total - start, budget, room)
        if count <= 0:
            return 0
        new_blocks = self._residents.grow(sequence, count)
        self._roster.cache.plan(sequence, start + count)  # before it is run: see PrefixCache
        self._roster.backlog -= count
        emit = int(start + count == total)
        if emit:
            self._residents.move(sequence, Phase.ENDING if total + 1 >= sequence.limit else Phase.DECODE)
        out.append((sequence, _scheduled(sequence.slot, start, count, emit, new_blocks)))
        return count

    def _admit(self, budget: int, out: list[Run], added: list[NewSequence]) -> int:
        """Waiting sequences enter, in order, while slots, blocks and budget last; returns their query tokens."""
        left = budget
        while left > 0 and self._residents.free_slots and takes_more(added):
            sequence = self._roster.queue.flow(None).head()
            if sequence is None:
                break
            hits = self._fit(sequence)
            if hits is None:
                break
            added.append(self._roster.admit(sequence, hits))
            left -= self._plan_chunk(sequence, left, out)
        return budget - left

    def _fit(self, sequence: Sequence) -> list[int] | None:
        """Its prefix hits, if there is room for its rest, for unfinished prompts and for what all may add."""
        residents, pool, cache = self._residents, self._pool, self._roster.cache
        if not len(residents):
            return cache.match(sequence)
        reserved = residents.blocks_for(self._headroom(sequence) * (len(residents) + 1))
        for other in residents.prefilling:
            reserved += residents.blocks_for(len(other.token_ids)) - len(other.blocks)
        if reserved >= pool.num_available:
            return None
        hits = cache.match(sequence)
        idle = sum(1 for block in hits if not pool.refs(block))  # available until it takes them
        own = residents.blocks_for(len(sequence.token_ids)) - len(hits)
        return hits if reserved + own + idle <= pool.num_available else None

    def _headroom(self, sequence: Sequence) -> int:
        """Tokens of room for each resident that its admission leaves."""
        if not sequence.preemptions:
            return self._watermark
        return max(self._watermark, 1) << min(sequence.preemptions, 32)

    def _make_room(self) -> tuple[list[Sequence], bool]:
        """The decodes that run, so that each finds its block, and whether anybody was preempted for it.

        While a sequence is about to end nobody is preempted: decodes that lack a block wait for it.
        """
        residents, mask = self._residents, self._block_size - 1
        decodes = list(residents.decoding)
        short = self._shortage() if len(decodes) > self._pool.num_available else 0
        if residents.ending:
            if short > 0:
                hungry = sorted((s for s in decodes if not s.planned & mask), key=_by_arrival)
                left_out = set(hungry[-short:])
                decodes = [s for s in decodes if s not in left_out]
            return decodes, False
        preempted = False
        while short > 0:
            self._roster.preempt(self._victim())
            preempted = True
            short = self._shortage()
        if residents.prefilling:
            preempted |= self._make_room_for_prefill()
        return (list(residents.decoding) if preempted else decodes), preempted

    def _make_room_for_prefill(self) -> bool:
        """The oldest part-done prefill finds a block for its next token, if younger sequences hold one."""
        preempted = False
        while self._shortage() >= 0:
            first = min(self._residents.prefilling, key=_by_arrival)
            victim = self._victim()
            if victim is first or first.planned & (self._block_size - 1):
                break
            self._roster.preempt(victim)
            preempted = True
        return preempted

    def _shortage(self) -> int:
        """Blocks that the next token of every decoding sequence needs beyond those available; negative: left over."""
        mask = self._block_size - 1
        return sum([1 for s in self._residents.decoding if not s.planned & mask]) - self._pool.num_available

    def _victim(self) -> Sequence:
        residents = self._residents
        return max((*residents.decoding, *residents.prefilling), key=_by_arrival)


def takes_more(added: list[NewSequence]) -> bool:
    """Whether a plan that adds these may add another one."""
    return sum([len(new.token_ids) for new in added]) < MOST_NEW_TOKENS


def _masked(sequences: list[Sequence], runs: list[ScheduledSequence]) -> tuple[int, ...]:
    """The slots that draw under a mask."""
    return tuple([r.slot for s, r in zip(sequences, runs, strict=True) if s.grammar is not None and r.emit])


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
