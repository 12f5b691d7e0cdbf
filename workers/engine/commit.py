"""What follows from a step that has run: charges, blocks that can be shared, drawn tokens, ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from workers.api.errors import EngineFault
from workers.api.request import INVALID, Delta, FinishReason
from workers.engine.plan import ScheduledSequence, SlotResult, StepPlan, StepResult
from workers.engine.quick import quick
from workers.engine.roster import Roster
from workers.engine.scheduler import PlannedStep
from workers.engine.sequence import Flow, Phase, Sequence
from workers.engine.stop import finish_reason

_delta = quick(Delta)


@dataclass(slots=True)
class _Tally:
    """What a step comes to, in tokens."""

    prefill: int = 0
    decode: int = 0
    overhead: int = 0
    flows: list[Flow] = field(default_factory=list)  # that were charged
    deltas: list[Delta] = field(default_factory=list)


class Committer:
    """Commits planned steps in their order."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._priced = roster.ordering is not None  # nobody hears of charges otherwise: none are made

    def commit(self, step: PlannedStep, result: StepResult, put_off: Collection[int] = frozenset()) -> list[Delta]:
        """The step is accounted for, full blocks are registered; returns one delta for each sequence that drew.

        Work for a sequence that has ended meanwhile is overhead, and so is that in slots that were `put_off`, which
        drew nothing. Raises EngineFault, with nothing changed, if the result is not the plan's.
        """
        _check_result(step.plan, result)
        self._roster.in_flight -= 1
        tally = _Tally()
        if result.prompts:
            _take_prompts(step, result)
        count = 0 if put_off else step.num_decodes
        self._commit_decodes(step.sequences[:count], step.plan.scheduled[:count], result.slots[:count], tally)
        answers = iter(result.slots[count:])
        for sequence, run in zip(step.sequences[count:], step.plan.scheduled[count:], strict=True):
            answer = next(answers) if run.emit else None
            if run.slot in put_off:
                self._charge(sequence.flow, tally, 0, 0, 0, run.count)
            else:
                self._commit_one(sequence, run, answer, tally)
        self._roster.stats.steps_cut += result.cut
        self._roster.stats.count_step(result.seconds, step.num_tokens, tally.prefill, tally.decode, tally.overhead)
        if self._roster.ordering is not None:
            charges = [flow.take_charge() for flow in tally.flows]
            self._roster.ordering.executed(step.num_tokens, charges, step.expected.value)
        return tally.deltas

    def _commit_decodes(
        self,
        sequences: tuple[Sequence, ...],
        runs: tuple[ScheduledSequence, ...],
        answers: tuple[SlotResult, ...],
        tally: _Tally,
    ) -> None:
        """The hot loop: nearly all are decodes that, but for a stop id, go on. The others take the general way."""
        cache, mask, priced = self._roster.cache, self._roster.block_size - 1, self._priced
        decoding, deltas, plain = Phase.DECODE, tally.deltas, 0
        for sequence, run, answer in zip(sequences, runs, answers, strict=True):
            drawn = answer.token_ids
            if sequence.phase is not decoding or answer.fault is not None or drawn[0] in sequence.stop_ids:
                self._commit_one(sequence, run, answer, tally)
                continue
            sequence.accounted = end = run.start + 1
            plain += 1
            if priced:
                flow = sequence.flow
                flow.decode += 1
                flow.kv_read += end
                if not flow.charged:
                    flow.charged = True
                    tally.flows.append(flow)
            if not end & mask:
                cache.register(sequence, end)
            sequence.token_ids.extend(drawn)
            deltas.append(_delta(sequence.id, end - sequence.num_prompt, drawn, answer.logprobs))
        tally.decode += plain

    def _commit_one(self, sequence: Sequence, run: ScheduledSequence, answer: SlotResult | None, tally: _Tally) -> None:
        if sequence.phase is Phase.FINISHED:
            self._charge(sequence.flow, tally, 0, 0, 0, run.count)
            return
        end = run.start + run.count
        self._charge(sequence.flow, tally, *_executed(sequence, run.count, end))
        if sequence.phase is not Phase.WAITING:  # else it was preempted meanwhile: its blocks are gone
            self._roster.cache.register(sequence, end)
        if answer is not None:
            delta = self._take(sequence, answer)
            if sequence.prompt_logprobs is not None and delta.error is None:
                delta = replace(delta, prompt_logprobs=tuple(sequence.prompt_logprobs))
                sequence.prompt_logprobs = None
            tally.deltas.append(delta)

    def _charge(self, flow: Flow, tally: _Tally, prefill: int, decode: int, kv_read: int, overhead: int) -> None:
        tally.prefill += prefill
        tally.decode += decode
        tally.overhead += overhead
        if self._priced:
            flow.prefill += prefill
            flow.decode += decode
            flow.kv_read += kv_read
            flow.overhead += overhead
            if not flow.charged:
                flow.charged = True
                tally.flows.append(flow)

    def _take(self, sequence: Sequence, answer: SlotResult) -> Delta:
        """The drawn tokens are known, up to the one that ends the sequence; returns its delta."""
        roster, drawn = self._roster, answer.token_ids
        if answer.fault is not None:
            roster.cache.forget(sequence)
            return roster.finish(sequence, FinishReason.ERROR, error=_why(sequence, answer.fault))
        if sequence.is_part:  # its search says what it goes on with
            return _delta(sequence.id, sequence.num_emitted, drawn, answer.logprobs)
        for taken, token in enumerate(drawn, 1):
            sequence.token_ids.append(token)
            if sequence.phase is Phase.WAITING:  # preempted while this was in flight
                roster.backlog += 1
            reason = finish_reason(sequence)
            if reason is not None:
                return roster.finish(sequence, reason, token_ids=drawn[:taken], logprobs=answer.logprobs[:taken])
        return _delta(sequence.id, sequence.num_emitted - len(drawn), drawn, answer.logprobs)


def _why(sequence: Sequence, fault: str) -> str:
    """What to say of a fault: where the grammar has failed, nothing could be drawn for that reason."""
    grammar = sequence.grammar
    if grammar is None or grammar.error is None:
        return fault
    return f"{INVALID}the grammar is too complex, or cannot go on: {grammar.error}"


def _take_prompts(step: PlannedStep, result: StepResult) -> None:
    """What is known of prompts goes to their sequences; one that was preempted is told the same again."""
    of_slot = {run.slot: sequence for sequence, run in zip(step.sequences, step.plan.scheduled, strict=True)}
    for one in result.prompts:
        known = of_slot[one.slot].prompt_logprobs
        if known is not None:
            del known[one.start - 1 :]
            known.extend(one.logprobs)


def _executed(sequence: Sequence, count: int, end: int) -> tuple[int, int, int, int]:
    """(prefill, decode, KV read, overhead) in the `count` positions before `end`; each is charged once, the rest of
    `count` is overhead.
    """
    first, prompt = sequence.accounted, sequence.num_prompt
    if end <= first:
        return 0, 0, 0, count
    sequence.accounted = end
    prefill = min(end, prompt) - first if first < prompt else 0
    decode = end - first - prefill
    kv_read = decode * (2 * end - decode + 1) // 2  # position p reads p + 1 tokens
    return prefill, decode, kv_read, count - prefill - decode


def _check_result(plan: StepPlan, result: StepResult) -> None:
    if result.step != plan.step:
        raise EngineFault(f"the executor answered step {result.step}, step {plan.step} was next")
    asked, answered = [run.slot for run in plan.scheduled if run.emit], [answer.slot for answer in result.slots]
    if asked != answered:
        raise EngineFault(f"step {plan.step} asked slots {asked}, the executor answered {answered}")
    if [answer for answer in result.slots if not answer.token_ids and not answer.fault]:
        raise EngineFault(f"step {plan.step}: the executor drew no token for a slot and names no fault")
