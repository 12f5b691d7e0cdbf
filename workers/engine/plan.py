"""What one step runs (`StepPlan`), what it yields (`StepResult`), and who runs it (`Executor`).

Every rank keeps the state of the batch by slot: the tokens of a sequence, its block table, its sampling parameters. A
plan carries changes only. A token drawn in step N is written by the rank itself at the sequence's next position, so
step N+1 can be planned, and run, before the host has seen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from workers.api.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence enters slot `slot`: after admission, or again after preemption.

    `token_ids` are all that is known (prompt, resumed, emitted). The first `num_prompt` are prompt; penalties count the
    rest as emitted, and so does `min_tokens`.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt: int
    sampling: SamplingParams
    blocks: tuple[int, ...]  # those it holds before this step's `ScheduledSequence.new_blocks` (prefix hits)
    adapter: str | None = None
    masked: bool = False  # each of its draws is under a mask, see `StepMasks`


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Run the tokens at positions [start, start + count) of the sequence in `slot`.

    `emit` tokens are drawn after the last of them (0 for a prefill chunk that is not the prompt's end, else 1 today; k
    for speculative decoding). `new_blocks` are appended to its block table first.
    """

    slot: int
    start: int
    count: int
    emit: int
    new_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ContinuedSequence:
    """The sequence in `slot` goes on with `token_id` at `position`, whatever its rank has drawn there. Before it stands
    what stands before that position in `source` (the same slot, or one of the same parameters and as many blocks): it
    shares the full blocks of that, and what is in the last one, if it is not full, is copied to its own last one.
    """

    slot: int
    source: int
    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. First are the sequences that are `continued`, whatever their order: what one takes over of another
    stays there. Then `removed` slots are emptied, then `added` ones filled (a slot may be in both), then all run.

    `scheduled` holds the sequences with count == 1 first, then the longer ones. With `masked` slots all draws wait for
    the step's `StepMasks`. Before anything runs, the content of blocks is copied: `copies_out` are (device block, host
    block), `copies_in`, which come after them, (host block, device block).
    """

    step: int
    removed: tuple[int, ...]
    added: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledSequence, ...]
    masked: tuple[int, ...] = ()
    copies_out: tuple[tuple[int, int], ...] = ()
    copies_in: tuple[tuple[int, int], ...] = ()
    continued: tuple[ContinuedSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return sum(s.count for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Which tokens the `slots` of a step may draw: a bit a token in words of 32, the lowest first, a row a slot."""

    step: int
    slots: tuple[int, ...]
    bits: bytes


@dataclass(frozen=True, slots=True)
class SlotResult:
    """What was drawn for one slot. `fault` (say, NaN logits) ends that request alone."""

    slot: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens at positions `start`, `start` + 1, ... of the sequence in `slot`."""

    slot: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry for each scheduled sequence with emit > 0, in the plan's order. `seconds`: device time of the step.

    `prompts`: of sequences that want log-probabilities of their prompt, those whose tokens before were run.
    `cut`: it was run in parts, since there was no memory for it as a whole.
    """

    step: int
    slots: tuple[SlotResult, ...]
    seconds: float
    prompts: tuple[PromptLogprobs, ...] = ()
    cut: bool = False


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for it. Raises EngineFault when the step as a whole failed."""


class Executor(Protocol):
    """Runs plans, in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step; returns before it is done where the device is asynchronous."""

    def draw(self, masks: StepMasks) -> None:
        """The step submitted last, whose plan has `masked` slots, goes on to its draws. Ahead of the next `submit`."""
