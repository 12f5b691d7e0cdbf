"""Beam search as arithmetic: which continuations are kept, which have ended, when nothing better can come. Pure.

At each length the W most likely continuations of all beams go on. One that ends, by a stop id or at the greatest
length, is an answer if it is among the first W; the W best answers are kept. The score of an answer of n tokens is the
sum of their log-probabilities divided by n ** length_penalty (Wu et al., 2016, without its constant; transformers has
the same). The search is over when W answers are kept and no beam can reach the score of the last of them any more: what
transformers calls `early_stopping="never"`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from workers.api.request import BeamParams, FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Beam:
    """Tokens of an answer, or of what may become one, and the sum of their log-probabilities.

    `logprobs` has an entry a token where they are wanted, else none. `parent`: the beam that it continues, by its place
    among the running ones before. `finish` is None while it runs.
    """

    token_ids: tuple[int, ...] = ()
    total: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    parent: int = 0
    finish: FinishReason | None = None


class BeamSearch:
    """One search. `longest`: tokens that an answer can have at most."""

    def __init__(self, beams: BeamParams, sampling: SamplingParams, longest: int) -> None:
        self._width, self._penalty, self._longest = beams.width, beams.length_penalty, longest
        self._stop_ids = frozenset(sampling.stop_ids)
        self._min_tokens, self._shown = sampling.min_tokens, sampling.logprobs
        self.running = [Beam()]
        self._answers: list[tuple[float, Beam]] = []  # the best first

    @property
    def candidates(self) -> int:
        """How many of the most likely tokens of each running beam `advance` must be told, to be exact."""
        return self._width + len(self._stop_ids)

    @property
    def is_over(self) -> bool:
        """Whether `answers` are final."""
        if not self.running:
            return True
        if len(self._answers) < self._width:
            return False
        best = self.running[0]
        length = self._longest if self._penalty > 0 else len(best.token_ids)
        return self._score(best.total, length) <= self._answers[-1][0]

    @property
    def answers(self) -> list[Beam]:
        """The best ones so far, the best first."""
        return [beam for _, beam in self._answers]

    def advance(self, tops: Sequence[Sequence[tuple[int, float]]]) -> None:
        """All running beams are one token longer, or over. `tops`: of each the `candidates` most likely next tokens
        with their log-probabilities, or all there are.
        """
        length = len(self.running[0].token_ids) + 1
        may_stop, at_end = length > self._min_tokens, length >= self._longest
        ranked = heapq.nsmallest(
            self._width * (1 + len(self._stop_ids)),  # so that some go on, even if all beams stop in all ways
            (
                (-(beam.total + logprob), parent, token)
                for parent, (beam, top) in enumerate(zip(self.running, tops, strict=True))
                for token, logprob in top
                if may_stop or token not in self._stop_ids
            ),
        )
        running: list[Beam] = []
        for rank, (negative, parent, token) in enumerate(ranked):
            stops = token in self._stop_ids
            if stops or at_end:
                if rank < self._width:
                    finish = FinishReason.STOP if stops else FinishReason.LENGTH
                    beam = self._continued(parent, token, -negative, tops[parent], finish)
                    self._answers.append((self._score(beam.total, length), beam))
            elif len(running) < self._width:
                running.append(self._continued(parent, token, -negative, tops[parent], None))
        self._answers.sort(key=lambda answer: -answer[0])
        del self._answers[self._width :]
        self.running = running

    def _continued(
        self, parent: int, token: int, total: float, top: Sequence[tuple[int, float]], finish: FinishReason | None
    ) -> Beam:
        beam = self.running[parent]
        logprobs = beam.logprobs
        if self._shown is not None:
            logprob = next(value for other, value in top if other == token)
            rank = 1 + sum(value > logprob for _, value in top)
            logprobs = (*logprobs, TokenLogprobs(token, logprob, rank, tuple(top[: self._shown])))
        return Beam((*beam.token_ids, token), total, logprobs, parent, finish)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self._penalty)
