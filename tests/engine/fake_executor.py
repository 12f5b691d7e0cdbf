"""An executor that checks every plan, and whose model reads what the plan says attention would read.

The KV store holds, per (block, offset), the token that was run there and its position. The next token is a hash of all
tokens read through the block table, of the seed and of the position, so a wrong block, a stale block or a wrong order
changes the answer. `oracle` computes the same answer from the request alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from workers.api.errors import EngineFault
from workers.api.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from workers.engine.plan import SlotResult, StepPlan, StepResult

VOCAB = 64
Fault = Callable[[int, int], bool]  # (seed, position of the token to draw) -> whether that draw fails


def draw(tokens: Sequence[int], sampling: SamplingParams, num_prompt: int) -> int:
    """The model and its sampler: a pure function of all tokens before, and of the request."""
    h = hashlib.blake2b(digest_size=4)
    h.update(bytes(tokens))
    h.update(f"{sampling.seed}/{sampling.choice}".encode())
    token = int.from_bytes(h.digest(), "little") % VOCAB
    if len(tokens) - num_prompt < sampling.min_tokens:
        while token in sampling.stop_ids:
            token = (token + 1) % VOCAB
    return token


def likeliest(tokens: Sequence[int], count: int) -> tuple[tuple[int, float], ...]:
    """The model's `count` most likely next tokens and their log-probabilities: a pure function of all tokens before."""
    scores = [byte / 40 for byte in hashlib.blake2b(bytes(tokens), digest_size=VOCAB).digest()]
    whole = math.log(sum(math.exp(score) for score in scores))
    ranked = sorted(range(VOCAB), key=lambda token: -scores[token])
    return tuple((token, scores[token] - whole) for token in ranked[:count])


def beam_oracle(
    request: EngineRequest, context: int, fault: Fault = lambda seed, position: False
) -> list[tuple[tuple[int, ...], FinishReason]] | None:
    """The answers of a beam search that runs alone, all to the greatest length; None: it comes to a fault."""
    asked, prompt = request.sampling, request.prompt_ids
    assert request.beams is not None
    width, penalty = request.beams.width, request.beams.length_penalty
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    answers: list[tuple[float, tuple[int, ...], FinishReason]] = []
    longest = min(asked.max_tokens, context - len(prompt))
    for length in range(1, longest + 1):
        if fault(asked.seed, len(prompt) + length - 1):
            return None
        found = sorted(
            (-(total + logprob), parent, token)
            for parent, (total, ids) in enumerate(beams)
            for token, logprob in likeliest(prompt + ids, VOCAB)
            if length > asked.min_tokens or token not in asked.stop_ids
        )
        longer = [(-negative, (*beams[parent][1], token)) for negative, parent, token in found]
        for total, ids in longer[:width]:
            if ids[-1] in asked.stop_ids or length == longest:
                reason = FinishReason.STOP if ids[-1] in asked.stop_ids else FinishReason.LENGTH
                answers.append((total / length**penalty, ids, reason))
        answers = sorted(answers, key=lambda answer: -answer[0])[:width]
        beams = [beam for beam in longer if beam[1][-1] not in asked.stop_ids][:width]
    return [(ids, reason) for _, ids, reason in answers]


def oracle(
    request: EngineRequest, context: int, fault: Fault = lambda seed, position: False
) -> tuple[list[int], FinishReason]:
    """The tokens (resumed ones left out) and the end of a request that runs alone."""
    tokens, sampling = list(request.known_ids), request.sampling
    start = len(tokens)
    while True:
        if fault(sampling.seed, len(tokens)):
            return tokens[start:], FinishReason.ERROR
        tokens.append(draw(tokens, sampling, len(request.prompt_ids)))
        emitted = len(tokens) - len(request.prompt_ids)
        if tokens[-1] in sampling.stop_ids and emitted > sampling.min_tokens:
            return tokens[start:], FinishReason.STOP
        if emitted >= sampling.max_tokens or len(tokens) >= context:
            return tokens[start:], FinishReason.LENGTH


@dataclass
class Slot:
    """What a rank keeps of a sequence."""

    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    blocks: list[int]
    computed: int


@dataclass
class FakeExecutor:
    """Runs a plan when it is submitted; asserts that results are awaited in order, at most `depth` late."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    context: int
    depth: int = 2
    fault: Fault = lambda seed, position: False
    fail_submit_at: int | None = None
    fail_result_at: int | None = None
    num_host_blocks: int = 0
    slots: dict[int, Slot] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    awaited: int = 0

    def __post_init__(self) -> None:
        self.store: list[list[tuple[int, int] | None]] = [[None] * self.block_size for _ in range(self.num_blocks)]
        self.host: list[list[tuple[int, int] | None]] = [[] for _ in range(self.num_host_blocks)]

    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.step == self.fail_submit_at:
            raise EngineFault(f"rank 0 refused step {plan.step}")
        assert plan.step == len(self.plans), f"step {plan.step} after {len(self.plans) - 1}"
        assert len(self.plans) - self.awaited < self.depth, "too many steps in flight"
        self.plans.append(plan)
        self._continue(plan)
        self._copy(plan)
        self._change(plan)
        self._check_shape(plan)
        for run in plan.scheduled:  # as in a layer: all keys and values of a step are stored before any is read
            self._store(run.slot, run.start, run.count, run.emit)
        self._check_shared()
        results = [self._draw(run.slot) for run in plan.scheduled if run.emit]
        return FakeHandle(self, StepResult(plan.step, tuple(results), 0.001))

    def _continue(self, plan: StepPlan) -> None:
        assert len({one.slot for one in plan.continued}) == len(plan.continued), "a slot goes on in two ways"
        for one in plan.continued:
            state, source = self.slots[one.slot], self.slots[one.source]
            assert one.position == source.computed == state.computed, f"{one} goes on elsewhere than it stands"
            assert len(state.blocks) == len(source.blocks) == -(-one.position // self.block_size)
            full = one.position // self.block_size
            if one.source != one.slot and full < len(state.blocks):
                self.store[state.blocks[full]] = list(self.store[source.blocks[full]])
            tokens = [*source.tokens[: one.position], one.token_id]
            self.slots[one.slot] = replace(state, tokens=tokens, blocks=source.blocks[:full] + state.blocks[full:])

    def _copy(self, plan: StepPlan) -> None:
        assert len({host for _, host in plan.copies_out}) == len(plan.copies_out), "a host block is written twice"
        for block, host in plan.copies_out:
            assert None not in self.store[block], f"block {block} is copied out, but not full: {self.store[block]}"
            self.host[host] = list(self.store[block])
        for host, block in plan.copies_in:
            assert self.host[host], f"host block {host} is copied in, but was never written"
            self.store[block] = list(self.host[host])

    def _change(self, plan: StepPlan) -> None:
        assert len(set(plan.removed)) == len(plan.removed)
        for slot in plan.removed:
            del self.slots[slot]  # KeyError: it was empty
        held = {b for s in self.slots.values() for b in s.blocks}
        for new in plan.added:
            assert new.slot not in self.slots, f"slot {new.slot} is taken"
            assert 0 <= new.slot < self.max_num_seqs
            assert all(0 <= t < VOCAB for t in new.token_ids)
            assert 1 <= new.num_prompt <= len(new.token_ids)
            hit = len(new.blocks) * self.block_size
            assert hit < len(new.token_ids), "a hit covers the whole prompt"
            self.slots[new.slot] = Slot(list(new.token_ids), new.num_prompt, new.sampling, list(new.blocks), hit)
        for run in plan.scheduled:
            for block in run.new_blocks:
                assert block not in held, f"block {block} is given to slot {run.slot} but held"
                held.add(block)
                self.store[block] = [None] * self.block_size  # stale KV must not help
            self.slots[run.slot].blocks.extend(run.new_blocks)

    def _check_shared(self) -> None:
        """A block of two tables is a full block of a common prefix, and nobody writes there."""
        owners: dict[int, tuple[int, int]] = {}
        for slot, state in self.slots.items():
            for index, block in enumerate(state.blocks):
                if block in owners:
                    assert owners[block][1] == index, f"block {block} at two places of two tables"
                    assert (index + 1) * self.block_size <= state.computed, f"shared block {block} not full"
                    assert (index + 1) * self.block_size <= self.slots[owners[block][0]].computed
                owners[block] = (slot, index)

    def _check_shape(self, plan: StepPlan) -> None:
        slots = [s.slot for s in plan.scheduled]
        assert slots, "an empty plan"
        assert len(set(slots)) == len(slots), "a slot runs twice"
        assert {n.slot for n in plan.added} <= set(slots), "a sequence is added but not run"
        assert plan.num_tokens <= self.max_num_batched_tokens
        counts = [s.count for s in plan.scheduled]
        assert min(counts) >= 1
        first_longer = next((i for i, c in enumerate(counts) if c > 1), len(counts))
        assert all(c > 1 for c in counts[first_longer:]), f"single tokens come first, got {counts}"

    def _store(self, slot: int, start: int, count: int, emit: int) -> None:
        state = self.slots[slot]
        end = start + count
        assert start == state.computed, f"slot {slot}: starts at {start}, {state.computed} are computed"
        assert end <= len(state.tokens), f"slot {slot}: position {end - 1} has no token"
        assert emit == (end == len(state.tokens)), f"slot {slot}: emit {emit} at {end} of {len(state.tokens)}"
        assert len(state.blocks) == -(-end // self.block_size), f"slot {slot}: {len(state.blocks)} blocks for {end}"
        for position in range(start, end):
            cell = self.store[state.blocks[position // self.block_size]]
            assert cell[position % self.block_size] is None, f"slot {slot}: position {position} is written twice"
            cell[position % self.block_size] = (position, state.tokens[position])
        state.computed = end
        assert end < self.context or not emit, "planned beyond the context"
        assert end - state.num_prompt < state.sampling.max_tokens or not emit, "planned beyond max_tokens"

    def _draw(self, slot: int) -> SlotResult:
        state = self.slots[slot]
        end = state.computed
        read = self._read(state, end)
        if self.fault(state.sampling.seed, end):
            state.tokens.append(0)  # what a rank puts there is garbage
            return SlotResult(slot, (), fault=f"logits at position {end} are not finite")
        token = draw(read, state.sampling, state.num_prompt)
        state.tokens.append(token)
        wanted = state.sampling.logprobs
        logprobs = () if wanted is None else (TokenLogprobs(token, -1.0, 1, likeliest(read, wanted)),)
        return SlotResult(slot, (token,), logprobs)

    def _read(self, state: Slot, end: int) -> list[int]:
        """The tokens that attention over positions [0, end) would see."""
        tokens = []
        for position in range(end):
            cell = self.store[state.blocks[position // self.block_size]][position % self.block_size]
            assert cell is not None, f"position {position} reads a hole"
            assert cell == (position, state.tokens[position]), f"position {position} reads {cell}"
            tokens.append(cell[1])
        return tokens


@dataclass
class FakeHandle:
    """A step that ran at its submission."""

    executor: FakeExecutor
    answer: StepResult

    def result(self) -> StepResult:
        assert self.answer.step == self.executor.awaited, "awaited out of order"
        self.executor.awaited += 1
        if self.answer.step == self.executor.fail_result_at:
            raise EngineFault(f"rank 1 died in step {self.answer.step}")
        return self.answer
