"""Steps under way: what is there of one between its start and its result, and handles on what comes later.

Shapes: E emitting rows, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NoReturn, TypeVar

import torch

from workers.api.errors import EngineFault
from workers.api.request import TokenLogprobs
from workers.engine.plan import SlotResult, StepHandle, StepMasks, StepResult
from workers.execution.flat import FlatStep
from workers.execution.prompt_scores import PromptScores
from workers.execution.sampler import FAULTS, Logprobs, Sampled
from workers.execution.sampling_state import PromptRows, SamplingBatch, WantedLogprobs
from workers.parallel.group import Outcome

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """What a step, or a part of one, has drawn: it lies on the host, or will once the step's event has happened."""

    emit_slots: tuple[int, ...]
    wanted: WantedLogprobs | None
    sampled: Sampled | None
    prompts: Sequence[PromptScores] = ()


@dataclass(slots=True)
class Launched:
    """A step under way. `cut`: it did not run as a whole; `lost`: of its slots, those that have no memory, and why;
    `lent`: its host buffers; `end` (CUDA): all of it has run. `settle`: what is left to do once the ranks have voted,
    or `fault`, why that failed, and seconds on the host that it took `again`.
    """

    parts: list[Part]
    lent: list[torch.Tensor]
    cut: bool = False
    lost: dict[int, str] = field(default_factory=dict)
    end: torch.cuda.Event | None = None
    settle: Callable[[], None] | None = None
    fault: Exception | None = None
    again: float = 0.0


@dataclass(slots=True)
class Undrawn:
    """A step, or a part of one, after its forward pass. `sampled` is there where the captured draw was all it needed;
    else `logits` [E, V / ranks], unless nobody draws, and `emit_at` [E], the places of the drawn tokens.
    """

    emit_slots: tuple[int, ...]
    sampling: SamplingBatch
    prompts: Sequence[PromptScores] = ()
    sampled: Sampled | None = None
    logits: torch.Tensor | None = None
    emit_at: torch.Tensor | None = None


@dataclass(slots=True)
class Begun:
    """A pass until its draws, or `why` there was no memory for it. `captured`: a replay. `outcome`: of the vote,
    for its draws. `seconds` on the host.
    """

    flat: FlatStep
    rows: Sequence[PromptRows]
    captured: bool = False
    undrawn: Undrawn | None = None
    why: str | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0


class Deferred(Generic[T]):
    """A handle whose result is made when it is asked for, once."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._outcome: T | EngineFault | None = None
        self._lock = threading.Lock()

    def result(self) -> T:
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


def that_failed(fault: EngineFault) -> Deferred[Any]:
    """A handle of a step that could not be started."""

    def fail() -> NoReturn:
        raise fault

    return Deferred(fail)


class Waiting:
    """A handle of a step that goes on when its masks are there."""

    def __init__(self, go_on: Callable[[StepMasks], StepHandle]) -> None:
        self._go_on = go_on
        self._rest: StepHandle | None = None

    def draw(self, masks: StepMasks) -> None:
        """The rest of the step is under way."""
        self._rest = self._go_on(masks)

    def result(self) -> StepResult:
        """See `StepHandle`."""
        assert self._rest is not None, "a step's masks come before its result is asked for"
        return self._rest.result()


def read_part(part: Part) -> tuple[SlotResult, ...]:
    """What its rows drew, once it lies on the host."""
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
    found = {
        row: TokenLogprobs(tokens[row], chosen[n], rank[n], tuple(zip(top_ids[n][:count], top[n][:count], strict=True)))
        for n, (row, count) in enumerate(zip(wanted.host_rows, wanted.counts, strict=True))
    }
    if values.named is not None and wanted.named is not None:
        of_named, at = values.named.tolist(), 0
        for n, ids in wanted.named.host.items():
            row, end = wanted.host_rows[n], at + len(ids)
            # The drawn token stands first, and once.
            shown = {tokens[row]: chosen[n]} | dict(zip(ids.tolist(), of_named[at:end], strict=True))
            found[row], at = replace(found[row], top=tuple(shown.items())), end
    return found
