"""What an engine is asked (`EngineRequest`) and what it answers (`Delta`). One request is one sequence.

A chat with n choices is n engine requests under one lease; prefix caching shares their prompt. A beam search is one
request with several answers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from workers.api.grammar import GrammarSpec

MAX_BEAMS = 32  # of one search: the host ranks the square of them every step
MAX_LENGTH_PENALTY = 10.0  # either way: a length to the power of it is a number
INVALID = "invalid: "  # how `Delta.error` starts when the request itself is at fault: no replica would take it


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Every request gets exactly one."""

    STOP = "stop"  # a stop id was emitted (it is the last token of the delta)
    LENGTH = "length"  # max_tokens or the model's context was reached
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # the engine failed; `Delta.error` says how


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Counts are in tokens; 0 or None switches a filter off as noted.

    The draw is a pure function of (logits, seed, choice, position): see `workers.api.philox`.
    End-of-sequence is just one of the `stop_ids`; who wants to ignore it leaves it out.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] = ()  # empty = all
    seed: int = 0  # unsigned 64 bit
    choice: int = 0  # index among the n choices of one prompt
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # stop ids are masked before this many tokens were emitted
    logprobs: int | None = None  # None = none; k = the drawn token's and the k most likely ones'
    prompt_logprobs: int | None = None  # the same of the prompt's tokens; nothing of it is then taken from the cache
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids that are never emitted; the prompt does not count
    logprob_ids: tuple[int, ...] = ()  # with `logprobs`: shown after the drawn token, in the place of the likeliest


@dataclass(frozen=True, slots=True)
class BeamParams:
    """A search for the `width` most likely answers, in place of a draw. Of its `SamplingParams` only the limits, the
    stop ids and the log-probabilities count. `length_penalty` above 0 is for long answers, below for short ones.
    """

    width: int
    length_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class MediaSegment:
    """A span of the prompt that stands for an image: positions [start, start + length), and its content hash."""

    start: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run.

    `resumed_ids` were emitted before a replay: they are neither prompt nor new. Penalties, limits and random positions
    count on through them, and the first `Delta.position` is `len(resumed_ids)`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    resumed_ids: tuple[int, ...] = ()
    owner: str = ""  # opaque to the engine, as is `tier`; a policy that orders steps reads them
    tier: str = ""
    age: float = 0.0  # seconds since the request first came, for policies
    salt: bytes = b""  # part of every block hash: owners do not share prefixes unless they share a salt
    adapter: str | None = None
    media: tuple[MediaSegment, ...] = ()
    grammar: GrammarSpec | None = None  # what the answer must look like; `min_tokens` yields where it can only stop
    beams: BeamParams | None = None  # then it has several answers, and all of them come at its end

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Prompt and resumed tokens: all that is known at the start."""
        return self.prompt_ids + self.resumed_ids

    @property
    def answer_ids(self) -> tuple[str, ...]:
        """The ids that its deltas bear: its own, or one for each answer of a beam search, that of the best first."""
        return (self.id,) if self.beams is None else tuple([f"{self.id}/{i}" for i in range(self.beams.width)])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the unfiltered distribution) at one position."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to one sequence.

    `position` counts emitted tokens from the start of the answer, resumed ones included, so that a receiver drops
    duplicates and refuses gaps. The last delta has `finish`; then come the counts for the bill.
    """

    request_id: str
    position: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache (last delta only)
    executed_prefill: int = 0  # prefill tokens run for this sequence (last delta only)
    executed_decode: int = 0
    preemptions: int = 0  # of this sequence (last delta only)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on (first delta only)


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """The request ledger: accepted == completed + aborted + failed + running, at any instant."""

    accepted: int = 0
    completed: int = 0
    aborted: int = 0
    failed: int = 0
    running: int = 0  # waiting ones included

    @property
    def balanced(self) -> bool:
        """Whether every accepted request is accounted for."""
        return self.accepted == self.completed + self.aborted + self.failed + self.running
