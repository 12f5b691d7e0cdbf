"""Which sequences run in the next step, in the order of a policy (`workers.api.ordering`). Pure: no I/O.

Steps in which all decodes run, nobody waits for room that others hold, and no prompt is part-done, need no order: the
policy is asked once. All others are filled turn by turn; inside a turn come the flow's decodes, oldest first, then its
part-done prefills, then its queue. Turns that nothing can come between, of flows that only decode, are served at once.

Whoever needs a slot or a block takes it from the flow that the policy names, from its youngest sequence that is not in
the plan. Who waits and finds too little room keeps what there is: nobody whose turn comes later is admitted in that
step, else small requests would take it for ever (docs/adr/0005).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain
from math import inf

from workers.api.ordering import Charge, Ordering, Rest, Turn, Turns
from workers.api.ordering import Flow as Handle
from workers.engine.cost import StepCost
from workers.engine.filling import Filling
from workers.engine.roster import Roster
from workers.engine.scheduler import PlannedStep, Scheduler, takes_more
from workers.engine.sequence import Flow, Phase, Sequence

_NOTHING = (0.0, 0.0)
_SAFE = 0.99  # of an allowance in seconds: sums in another order may come out a little larger


class TurnScheduler(Scheduler):
    """Plans one step after the other; at most one may be uncommitted when the next is planned."""

    def __init__(
        self, roster: Roster, max_num_batched_tokens: int, watermark: int, ordering: Ordering, cost: StepCost
    ) -> None:
        super().__init__(roster, max_num_batched_tokens, watermark)
        self._ordering, self._cost = ordering, cost
        self._units, self._prices = ordering.prices, cost.prices  # of a token: units and seconds, in this step
        self._last: PlannedStep | None = None  # planned last
        self._now = 0.0
        self._holders: dict[Handle, list[Sequence]] | None = None  # who may yield, by flow, the youngest last
        self._evicted: set[Sequence] = set()  # in this step
        self._is_reserved = False  # what room there is, for one that found too little of it

    def plan(self, now: float) -> PlannedStep | None:
        """The next step, its blocks taken and its slots given; None if there is none before something is committed."""
        self._now = now
        step = self._plan_all_decodes() if self._nothing_to_decide() else self._plan_turns()
        if step is not None:
            self._last = step
        return step

    # all run

    def _nothing_to_decide(self) -> bool:
        residents = self._residents
        rows = len(residents.decoding)
        if not rows or residents.prefilling:
            return False
        if rows > self._pool.num_available and self._shortage() > 0:
            return False
        prices = self._cost.prices
        seconds = prices.decodes(rows, residents.kv_tokens)
        admitting = residents.free_slots > 0
        return self._ordering.undisputed(self._now, base=prices.base, seconds=seconds, admitting=admitting)

    def _plan_all_decodes(self) -> PlannedStep | None:
        sequences = list(self._residents.decoding)
        read = self._residents.kv_tokens
        return self._planned(sequences, self._plan_decodes(sequences), [], [], kv_tokens=read)

    # turn by turn

    def _plan_turns(self) -> PlannedStep | None:
        self._expect_last()
        base = self._cost.prices.base
        for bounded in (True, False):  # what lower flows may add is nothing to save where higher ones run nothing
            step = self._fill(self._ordering.turns(self._now, base=base, bounded=bounded))
            if step is not None:
                return step
        if self._roster.in_flight or not len(self._residents):
            return None
        self._holders = None  # part-done prefills hold all blocks, or who is resident sits out for who cannot enter
        holders = self._who_may_yield(Filling(0))
        lowest = self._ordering.lowest(holders)
        everybody = chain(self._residents.decoding, self._residents.prefilling)
        self._roster.preempt(max(everybody, key=lambda s: s.arrival) if lowest is None else holders[lowest][-1])
        return self._plan_turns()

    def _expect_last(self) -> None:
        """What is in flight counts, also where no turns were taken for it."""
        last = self._last
        if last is None or not self._roster.in_flight or last.expected.value is not None:
            return
        by_flow: dict[Flow, list[int]] = {}
        for sequence, run in zip(last.sequences, last.plan.scheduled, strict=True):
            if sequence.phase is Phase.FINISHED:
                continue
            sums = by_flow.setdefault(sequence.flow, [0, 0])
            sums[0] += 1
            sums[1] += run.start + 1
        charges = [Charge(f.handle, decode=count, kv_read=read) for f, (count, read) in by_flow.items()]
        last.expected.value = self._ordering.expect(charges)

    def _fill(self, turns: Turns) -> PlannedStep | None:
        plan = Filling(self._budget)
        self._units, self._prices = self._ordering.prices, self._cost.prices
        self._holders, self._is_reserved = None, False
        self._evicted.clear()
        at_once = True
        while plan.left > 0:
            if at_once and (rest := turns.rest()) is not None:
                at_once = self._serve_rest(rest, turns, plan)
            elif (turn := turns.next()) is not None:
                self._serve(turn, turns, plan)
            else:
                break
        expected = turns.close()
        step = self._planned(plan.decoding, plan.decodes, plan.chunks(), plan.added, kv_tokens=plan.kv_tokens)
        if step is not None:
            step.expected.value = expected
        return step

    def _serve_rest(self, rest: Rest, turns: Turns, plan: Filling) -> bool:
        """All turns of `rest` at once, if they are decodes that find their blocks; False, and nothing is changed, if
        they are not, or do not all fit in.
        """
        row, kv = self._prices.row, self._prices.kv
        per_decode, per_read = self._units.decode, self._units.kv_read
        mask, flow_of = self._block_size - 1, self._roster.queue.flow
        decodes: list[Sequence] = []
        served: list[tuple[Handle, float, float]] = []
        blocks = 0
        total = 0.0
        for handle in rest.flows:
            units = seconds = 0.0
            for sequence in self._runnable(flow_of(handle), plan):
                if units >= rest.units or sequence.phase is not Phase.DECODE:
                    return False
                start = sequence.planned
                blocks += not start & mask
                seconds += row + kv * (start + 1)
                if start >= sequence.accounted:
                    units += per_decode + per_read * (start + 1)
                decodes.append(sequence)
            served.append((handle, units, seconds))
            total += seconds
        if len(decodes) > plan.left or blocks > self._pool.num_available or total > _SAFE * rest.seconds:
            return False
        plan.decode(decodes, self._plan_decodes(decodes))
        turns.all_served(served)
        return True

    def _serve(self, turn: Turn, turns: Turns, plan: Filling) -> None:
        flow = self._roster.queue.flow(turn.flow)
        units = seconds = 0.0
        more = False
        runnable = self._runnable(flow, plan)
        for sequence in runnable if turn.only is None else [s for s in runnable if s.id == turn.only]:
            if plan.left <= 0:
                break
            if units >= turn.units or seconds >= turn.seconds:
                more = True
                break
            if sequence.phase is Phase.DECODE:
                added = self._decode(sequence, turn, plan, turn.seconds - seconds)
                units, seconds = units + added[0], seconds + added[1]
            elif sequence.phase is Phase.PREFILL:  # else it has yielded to an older one of its flow
                added = self._prefill(sequence, turn, plan, turn.units - units, turn.seconds - seconds)
                units, seconds = units + added[0], seconds + added[1]
        admissible = False
        while plan.left > 0 and not more and (turn.urgent or not self._is_reserved) and takes_more(plan.added):
            head = flow.head()
            if head is None or head in self._evicted or turn.only not in (None, head.id):
                break
            if units >= turn.units or turn.seconds - seconds < self._prices.prefill:
                more = True
                break
            hits = self._make_admissible(head, turn, plan)
            if hits is None:
                self._is_reserved |= not turn.urgent
                break
            admissible = True
            plan.added.append(self._roster.admit(head, hits))
            added = self._prefill(head, turn, plan, turn.units - units, turn.seconds - seconds)
            units, seconds = units + added[0], seconds + added[1]
        if more and not admissible and not self._is_reserved and turn.only is None and self._residents.free_slots:
            head = flow.head()
            admissible = head is not None and head not in self._evicted and self._fit(head) is not None
        turns.served(units, more=more, admissible=admissible, seconds=seconds)
        turns.admitting = not self._is_reserved

    def _runnable(self, flow: Flow, plan: Filling) -> list[Sequence]:
        """Its residents in the order of a turn."""
        residents = flow.residents
        if len(residents) == 1:  # the hot case
            (sequence,) = residents
            phase = sequence.phase
            runs = phase is Phase.PREFILL or (phase is Phase.DECODE and sequence not in plan.running)
            return [sequence] if runs else []
        decodes, prefills = [], []
        for sequence in residents:
            if sequence.phase is Phase.PREFILL:
                prefills.append(sequence)
            elif sequence.phase is Phase.DECODE and sequence not in plan.running:
                decodes.append(sequence)
        found = decodes or prefills
        if len(found) > 1 or (decodes and prefills):
            found = sorted(decodes, key=_by_arrival) + sorted(prefills, key=_by_arrival)
        return found

    def _decode(self, sequence: Sequence, turn: Turn, plan: Filling, seconds: float) -> tuple[float, float]:
        """The next position of a resident, if the turn has `seconds` for it and it finds its block; returns the units
        that it will be charged and the seconds that it adds.
        """
        end = sequence.planned + 1
        took = self._prices.row + self._prices.kv * end
        if took > seconds or not self._find_block(sequence, turn, plan):
            return _NOTHING
        plan.decode([sequence], self._plan_decodes([sequence]))
        again = end <= sequence.accounted
        return 0.0 if again else self._units.decode + self._units.kv_read * end, took

    def _prefill(
        self, sequence: Sequence, turn: Turn, plan: Filling, units: float, seconds: float
    ) -> tuple[float, float]:
        """As much of a prompt as the turn has left, blocks are there for, and the step has room for; returns the same
        as `_decode`.
        """
        price = self._units.prefill
        start = sequence.planned
        count = min(len(sequence.token_ids) - start, plan.left)
        known = max(min(sequence.accounted - start, count), 0)  # positions that run again
        if units < inf:
            count = min(count, known + max(int(units / price), 1))
        count = self._prices.fitting(start, count, seconds)
        if count <= 0 or not self._find_block(sequence, turn, plan):
            return _NOTHING
        count = self._plan_chunk(sequence, count, plan.parts)
        if count:
            plan.running.add(sequence)
        plan.left -= count
        return price * max(count - known, 0), self._prices.chunk(start, count)

    # room

    def _find_block(self, sequence: Sequence, turn: Turn, plan: Filling) -> bool:
        """Whether the next token of a resident finds a block, once whoever must yield has done so."""
        if sequence.planned & (self._block_size - 1):
            return True
        while not self._pool.num_available:
            if not self._yield(turn, plan, sequence):
                return False
        return True

    def _make_admissible(self, sequence: Sequence, turn: Turn, plan: Filling) -> list[int] | None:
        """Its prefix hits, once whoever must yield has done so; None, and nobody has, if that would not do."""
        checked = False
        while True:
            hits = self._fit(sequence) if self._residents.free_slots else None
            if hits is not None:
                return hits
            if not (checked or self._would_fit(sequence, turn, plan)) or not self._yield(turn, plan, None):
                return None
            checked = True

    def _would_fit(self, sequence: Sequence, turn: Turn, plan: Filling) -> bool:
        """Whether it could be admitted if all yielded that have to."""
        if self._holders is None:
            everybody = chain(self._residents.decoding, self._residents.prefilling)
            if not self._who_all_yield(turn, {s.flow.handle for s in everybody}):
                return False  # the usual case, known without looking at sequences
        holders = self._who_may_yield(plan)
        going = {sequence for handle in self._who_all_yield(turn, holders) for sequence in holders[handle]}
        residents, pool = self._residents, self._pool
        stay = len(residents) - len(going)
        if not going or not stay:
            return bool(going)
        wanted = residents.blocks_for(self._headroom(sequence) * (stay + 1) + len(sequence.token_ids))
        for other in residents.prefilling:
            if other not in going:
                wanted += residents.blocks_for(len(other.token_ids)) - len(other.blocks)
        if wanted - sum(len(s.blocks) for s in going) > pool.num_available:
            return False
        held = Counter(chain.from_iterable(s.blocks for s in going))
        freed = sum(1 for block, count in held.items() if pool.refs(block) == count)
        return wanted - len(self._roster.cache.match(sequence)) <= pool.num_available + freed

    def _yield(self, turn: Turn, plan: Filling, needy: Sequence | None) -> bool:
        """One sequence loses slot and blocks, if anybody must: to the resident `needy`, or to one that waits."""
        holders = self._who_may_yield(plan)
        found = self._who_yields(turn, holders, admission=needy is None)
        own = holders.get(turn.flow)
        if found is None and needy is not None and own and not self._residents.ending:
            younger = own[-1] is not needy and own[-1].arrival > needy.arrival
            found = turn.flow if younger else None
        if found is None:
            return False
        victim = holders[found][-1]
        self._roster.preempt(victim)
        self._evicted.add(victim)
        return True

    def _who_yields(self, turn: Turn, holders: Iterable[Handle], *, admission: bool) -> Handle | None:
        return self._ordering.victim(
            turn.flow,
            holders,
            admission=admission,
            urgent=turn.urgent,
            patient=bool(self._residents.ending),
        )

    def _who_all_yield(self, turn: Turn, holders: Iterable[Handle]) -> Collection[Handle]:
        """Those of `holders` that would lose something for the admission of one that waits."""
        patient = bool(self._residents.ending)
        return self._ordering.yielding(turn.flow, holders, admission=True, urgent=turn.urgent, patient=patient)

    def _who_may_yield(self, plan: Filling) -> dict[Handle, list[Sequence]]:
        """By flow the residents that are neither in the plan nor protected, the youngest last."""
        if self._holders is None:
            protected = set(self._ordering.protected(self._now))
            self._holders = {}
            for sequence in chain(self._residents.decoding, self._residents.prefilling):
                if sequence.id not in protected:
                    self._holders.setdefault(sequence.flow.handle, []).append(sequence)
            for sequences in self._holders.values():
                if len(sequences) > 1:
                    sequences.sort(key=_by_arrival)
        gone = []
        for handle, sequences in self._holders.items():
            while sequences and (sequences[-1] in plan.running or sequences[-1].phase is Phase.WAITING):
                sequences.pop()
            if not sequences:
                gone.append(handle)
        for handle in gone:
            del self._holders[handle]
        return self._holders


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
