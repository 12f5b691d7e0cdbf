"""The sampling parameters of the batch by slot, and which stages of the sampler a step needs for which rows.

They live on the host: they never change while a sequence runs, so a step uploads the few numbers of the rows that need
them, in the one copy that it makes anyway. Greedy rows need none.

Shapes: E emitting rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workers.api.request import SamplingParams
from workers.engine.plan import StepPlan
from workers.execution.bad_words import BadWords, WordList, gather
from workers.execution.upload import Array

Give = Callable[[Array], int]  # takes an array into the step's upload, returns its place there


@dataclass(frozen=True, slots=True)
class Draws:
    """Random draws. All [E]: temperatures fp32 (0 = greedy), seeds, positions, choices int64."""

    temperatures: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    choices: torch.Tensor


@dataclass(frozen=True, slots=True)
class Filters:
    """Rows with top-k, top-p or min-p, and the parameters of these rows."""

    rows: torch.Tensor
    temperatures: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with penalties: their slots, tokens known, prompt tokens, parameters. `longest` bounds the tokens known."""

    rows: torch.Tensor
    slots: torch.Tensor
    known: torch.Tensor
    prompt: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Biases:
    """values [n] are added at (rows [n], ids [n]); -inf masks."""

    rows: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows of which only some tokens may be drawn: those at (index into `rows`, id)."""

    rows: torch.Tensor
    index: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Masks:
    """Rows [n] int64 that draw under a mask, and their masks [n, V / 32] int32, see `kernels.token_mask`."""

    rows: torch.Tensor
    bits: torch.Tensor


@dataclass(frozen=True, slots=True)
class NamedIds:
    """Tokens whose log-probabilities are wanted: at (index into the rows that report some, id). `host` has a row's."""

    index: torch.Tensor
    ids: torch.Tensor
    host: dict[int, Array]


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Rows that report log-probabilities, and how many of the most likely tokens each; `named`: of which others."""

    rows: torch.Tensor
    host_rows: tuple[int, ...]
    counts: tuple[int, ...]
    named: NamedIds | None = None


@dataclass(frozen=True, slots=True)
class PromptRows:
    """`count` rows of the step from `first` on; the tokens after them stand at `start`, ... of the sequence in `slot`.

    `top`: how many of the most likely tokens are reported.
    """

    slot: int
    first: int
    start: int
    count: int
    top: int


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What the sampler does in one step; None where no row needs a stage. All None: one argmax."""

    draws: Draws | None = None
    filters: Filters | None = None
    penalties: Penalties | None = None
    biases: Biases | None = None
    allowed: Allowed | None = None
    logprobs: WantedLogprobs | None = None
    masks: Masks | None = None
    bad_words: BadWords | None = None

    @property
    def only_scored(self) -> bool:
        """Whether nothing changes which token is the most likely one, and that one is drawn."""
        stages = (self.draws, self.penalties, self.biases, self.allowed, self.bad_words, self.masks)
        return all(stage is None for stage in stages)


GREEDY = SamplingBatch()
_KINDS: dict[str, type[Any]] = {
    "draws": Draws,
    "filters": Filters,
    "penalties": Penalties,
    "biases": Biases,
    "allowed": Allowed,
    "bad_words": BadWords,
}
Finish = Callable[[Sequence[torch.Tensor]], SamplingBatch]


class SamplingState:
    """Parameters by slot. Ids outside of the vocabulary are dropped: no logit stands for them."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._params: list[SamplingParams | None] = [None] * max_num_seqs
        self._num_prompt = np.zeros(max_num_seqs, np.int64)
        # greedy and nothing else: the one flag that most steps look at
        self._plain = np.ones(max_num_seqs, np.bool_)
        self._masked = np.zeros(max_num_seqs, np.bool_)  # every draw is under a mask
        self._bad_words: dict[int, WordList] = {}
        self._named: dict[int, Array] = {}
        self._scored: set[int] = set()  # slots of which log-probabilities of the prompt are still to come

    def add(
        self, slot: int, params: SamplingParams, num_prompt: int, num_known: int = 0, *, masked: bool = False
    ) -> None:
        """A sequence of `num_known` tokens enters `slot`. Where some were emitted, its prompt was looked at before."""
        self._params[slot], self._num_prompt[slot], self._masked[slot] = params, num_prompt, masked
        if params.prompt_logprobs is not None and num_known <= num_prompt:
            self._scored.add(slot)
        elif self._scored:
            self._scored.discard(slot)
        self._bad_words.pop(slot, None)
        if params.bad_words:
            self._bad_words[slot] = WordList(params.bad_words, self._vocab_size)
        self._named.pop(slot, None)
        if params.logprob_ids:
            ids = np.array(params.logprob_ids, np.int64)
            self._named[slot] = ids[(ids >= 0) & (ids < self._vocab_size)]
        self._plain[slot] = not (
            params.temperature > 0
            or params.bad_words
            or params.logprobs is not None
            or params.logit_bias
            or params.allowed_ids
            or params.min_tokens > 0
            or masked
            or _penalized(params)
        )

    def plain(self, slots: Array) -> bool:
        """Whether all of `slots` draw the most likely token and ask for nothing else; so, too, where nobody draws."""
        return bool(self._plain[slots].all())

    def prompt_rows(self, plan: StepPlan) -> Sequence[PromptRows]:
        """The rows of the step after which a token of a prompt stands whose log-probability is wanted."""
        if not self._scored:
            return ()
        found, first = [], 0
        for run in plan.scheduled:
            params = self._params[run.slot]
            if run.slot in self._scored and params is not None:
                count = min(run.start + run.count, int(self._num_prompt[run.slot]) - 1) - run.start
                if count > 0:
                    found.append(PromptRows(run.slot, first, run.start + 1, count, params.prompt_logprobs or 0))
                if run.start + run.count >= self._num_prompt[run.slot]:
                    self._scored.discard(run.slot)
            first += run.count
        return found

    def select(self, slots: Array, positions: Array, give: Give) -> Finish:
        """Stages for the rows in `slots` [E], which draw the tokens at `positions` [E].

        Arrays go to the step's upload by `give`; the returned function makes the batch from the uploaded tensors.
        """
        if self.plain(slots):
            return lambda _tensors: GREEDY
        params = [self._params[slot] for slot in slots.tolist()]
        rows = [(i, p) for i, p in enumerate(params) if p is not None]
        places = {
            "draws": self._draws(rows, positions, give),
            "filters": self._filters(rows, give),
            "penalties": self._penalties(rows, slots, positions, give),
            "biases": self._biases(rows, slots, positions, give),
            "allowed": self._allowed(rows, give),
            "bad_words": self._ending_words(rows, slots, positions, give),
        }
        wanted = [(i, p.logprobs) for i, p in rows if p.logprobs is not None]
        wanted_place = give(np.array([i for i, _ in wanted], np.int64)) if wanted else 0
        named = {n: self._named[slot] for n, (i, _) in enumerate(wanted) if (slot := int(slots[i])) in self._named}
        index, ids = _give_names(named, give) if named else (0, 0)
        longest = int(positions.max())

        def finish(tensors: Sequence[torch.Tensor]) -> SamplingBatch:
            stages = {}
            for key, place in places.items():
                if place is not None:
                    extra = {"longest": longest} if key == "penalties" else {}
                    stages[key] = _KINDS[key](*(tensors[i] for i in place), **extra)
            if wanted:
                stages["logprobs"] = WantedLogprobs(
                    tensors[wanted_place],
                    tuple(i for i, _ in wanted),
                    tuple(k for _, k in wanted),
                    NamedIds(tensors[index], tensors[ids], named) if named else None,
                )
            return SamplingBatch(**stages)

        return finish

    def _draws(self, rows: list[tuple[int, SamplingParams]], positions: Array, give: Give) -> list[int] | None:
        if not any(p.temperature > 0 for _, p in rows):
            return None
        seeds = np.array([p.seed & 0xFFFFFFFFFFFFFFFF for _, p in rows], np.uint64).view(np.int64)
        return [
            give(np.array([p.temperature for _, p in rows], np.float32)),
            give(seeds),
            give(positions),
            give(np.array([p.choice for _, p in rows], np.int64)),
        ]

    def _filters(self, rows: list[tuple[int, SamplingParams]], give: Give) -> list[int] | None:
        chosen = [(i, p) for i, p in rows if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)]
        if not chosen:
            return None
        return [
            give(np.array([i for i, _ in chosen], np.int64)),
            give(np.array([p.temperature for _, p in chosen], np.float32)),
            give(np.array([p.top_k for _, p in chosen], np.int64)),
            give(np.array([p.top_p for _, p in chosen], np.float32)),
            give(np.array([p.min_p for _, p in chosen], np.float32)),
        ]

    def _penalties(
        self, rows: list[tuple[int, SamplingParams]], slots: Array, positions: Array, give: Give
    ) -> list[int] | None:
        chosen = [(i, p) for i, p in rows if _penalized(p)]
        if not chosen:
            return None
        index = np.array([i for i, _ in chosen], np.int64)
        return [
            give(index),
            give(slots[index]),
            give(positions[index]),
            give(self._num_prompt[slots[index]]),
            give(np.array([p.presence_penalty for _, p in chosen], np.float32)),
            give(np.array([p.frequency_penalty for _, p in chosen], np.float32)),
            give(np.array([p.repetition_penalty for _, p in chosen], np.float32)),
        ]

    def _biases(
        self, rows: list[tuple[int, SamplingParams]], slots: Array, positions: Array, give: Give
    ) -> list[int] | None:
        entries: list[tuple[int, int, float]] = []
        for i, p in rows:
            entries += [(i, token, value) for token, value in p.logit_bias if 0 <= token < self._vocab_size]
            if positions[i] - self._num_prompt[slots[i]] < p.min_tokens and not self._masked[slots[i]]:
                entries += [(i, token, -np.inf) for token in p.stop_ids if 0 <= token < self._vocab_size]
        if not entries:
            return None
        at, ids, values = zip(*entries, strict=True)
        return [give(np.array(at, np.int64)), give(np.array(ids, np.int64)), give(np.array(values, np.float32))]

    def _ending_words(
        self, rows: list[tuple[int, SamplingParams]], slots: Array, positions: Array, give: Give
    ) -> list[int] | None:
        if not self._bad_words:
            return None
        found = []
        for i, p in rows:
            if p.bad_words:
                slot, at = int(slots[i]), int(positions[i])
                found.append((i, slot, at, at - int(self._num_prompt[slot]), self._bad_words[slot]))
        arrays = gather(found)
        return None if arrays is None else [give(array) for array in arrays]

    def _allowed(self, rows: list[tuple[int, SamplingParams]], give: Give) -> list[int] | None:
        chosen = [(i, p.allowed_ids) for i, p in rows if p.allowed_ids]
        if not chosen:
            return None
        lists = [np.array(ids, np.int64) for _, ids in chosen]
        lists = [ids[(ids >= 0) & (ids < self._vocab_size)] for ids in lists]
        return [
            give(np.array([i for i, _ in chosen], np.int64)),
            give(np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])),
            give(np.concatenate(lists)),
        ]


def _give_names(named: dict[int, Array], give: Give) -> tuple[int, int]:
    lengths = [len(ids) for ids in named.values()]
    return give(np.repeat(np.array(list(named), np.int64), lengths)), give(np.concatenate(list(named.values())))


def _penalized(p: SamplingParams) -> bool:
    return p.presence_penalty != 0.0 or p.frequency_penalty != 0.0 or p.repetition_penalty != 1.0
