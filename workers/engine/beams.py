"""Beam searches in the engine: for each beam a sequence that draws one token, then the search says which go on.

Between two tokens a beam holds no slot and no block. What the prefix cache has of it, all full blocks but for the
evicted ones, is found again when its next sequence is admitted: so nothing here can block, or be blocked by, others,
and a search yields to them like any request. What is run again of the last, not yet full, block is overhead. The
sequences of a search come when it came: nobody who came later goes ahead of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from workers.api.request import Delta, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from workers.engine.beam_search import BeamSearch
from workers.engine.roster import Roster
from workers.engine.sequence import Phase, Sequence


@dataclass(slots=True)
class _Search:
    """A live one. `tops`: what its running beams drew, by their sequences; None: not yet."""

    request: EngineRequest
    arrival: int
    since: float
    beams: BeamSearch
    sampling: SamplingParams  # of each sequence, but for its limit
    tops: dict[Sequence, tuple[tuple[int, float], ...] | None] = field(default_factory=dict)
    sequences: int = 0  # so far
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cached: int = 0
    prefill: int = 0
    decode: int = 0
    preemptions: int = 0

    def account(self, sequence: Sequence) -> None:
        """A sequence of it has ended."""
        self.cached += sequence.cached
        self.prefill += sequence.executed_prefill
        self.decode += sequence.executed_decode
        self.preemptions += sequence.preemptions


class BeamSearches:
    """The live searches of an engine. True if there are any."""

    def __init__(self, roster: Roster, context: int) -> None:
        self._roster, self._context = roster, context
        self._by_id: dict[str, _Search] = {}  # by their requests' ids, and those of their answers
        self._parts: dict[str, tuple[_Search, Sequence]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def begin(self, request: EngineRequest, arrival: int, since: float) -> None:
        """A valid request is accepted; it first came at `since`."""
        assert request.beams is not None, "a beam search says how wide it is"
        asked = request.sampling
        longest = min(asked.max_tokens, self._context - len(request.prompt_ids))
        beams = BeamSearch(request.beams, asked, longest)
        sampling = replace(asked, stop_ids=(), min_tokens=0, logprobs=beams.candidates)
        search = _Search(request, arrival, since, beams, sampling)
        for name in (request.id, *request.answer_ids):
            self._by_id[name] = search
        self._roster.searches += 1
        self._roster.stats.accepted += 1
        self._add(search, (), [])

    def take(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """`deltas` of a step, with what its searches have found in place of what their sequences drew."""
        for delta in deltas:
            part = self._parts.pop(delta.request_id, None)
            if part is None:
                yield delta
            else:
                yield from self._take(*part, delta)

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> list[Delta]:
        """The search, by any of its ids, is over without an answer; returns its last deltas."""
        search = self._by_id[request_id]
        for sequence in search.tops:
            if sequence.id not in self._parts:
                continue
            if sequence.phase is not Phase.FINISHED:  # else its last delta comes yet, in the same step
                del self._parts[sequence.id]
                self._roster.finish(sequence, reason)
            search.account(sequence)
        return self._over(search, [Delta(name, 0, finish=reason, error=error) for name in search.request.answer_ids])

    def fail_all(self, message: str) -> list[Delta]:
        """All searches are over with this error; returns their last deltas."""
        found: list[Delta] = []
        while self._by_id:
            found += self.end(next(iter(self._by_id)), FinishReason.ERROR, message)
        return found

    def _take(self, search: _Search, sequence: Sequence, delta: Delta) -> list[Delta]:
        if search.request.id not in self._by_id:  # it ended with another one in the same step
            return []
        search.account(sequence)
        if delta.error is not None or delta.finish is not FinishReason.LENGTH:
            return self.end(search.request.id, delta.finish or FinishReason.ERROR, delta.error)
        search.prompt_logprobs = search.prompt_logprobs or delta.prompt_logprobs
        search.tops[sequence] = delta.logprobs[0].top
        tops = [top for top in search.tops.values() if top is not None]
        if len(tops) < len(search.tops):
            return []
        search.beams.advance(tops)
        if search.beams.is_over:
            return self._over(search, self._answers(search))
        parents = list(search.tops)
        search.tops = {}
        for beam in search.beams.running:
            self._add(search, beam.token_ids, parents[beam.parent].hashes)
        return []

    def _add(self, search: _Search, emitted: tuple[int, ...], hashes: list[bytes]) -> None:
        request = replace(
            search.request,
            id=f"{search.request.id}~{search.sequences}",
            sampling=replace(search.sampling, max_tokens=len(emitted) + 1),
            resumed_ids=emitted,
            beams=None,
        )
        sequence = Sequence(request, search.arrival, self._context, self._roster.flow(request), is_part=True)
        sequence.hashes = hashes.copy()
        search.sequences += 1
        search.tops[sequence] = None
        self._parts[sequence.id] = search, sequence
        self._roster.add(sequence, search.since)

    @staticmethod
    def _answers(search: _Search) -> list[Delta]:
        beams = search.beams.answers
        return [
            Delta(name, 0, beam.token_ids, beam.logprobs, beam.finish)
            for name, beam in zip(search.request.answer_ids, beams, strict=True)
        ]

    def _over(self, search: _Search, last: list[Delta]) -> list[Delta]:
        """The search is not live any more; the first of its deltas bears the counts and what is known of the prompt."""
        for name in (search.request.id, *search.request.answer_ids):
            del self._by_id[name]
        self._roster.searches -= 1
        self._roster.stats.count_finish(last[0].finish or FinishReason.ERROR)
        last[0] = replace(
            last[0],
            prompt_logprobs=search.prompt_logprobs,
            cached_tokens=search.cached,
            executed_prefill=search.prefill,
            executed_decode=search.decode,
            preemptions=search.preemptions,
        )
        return last
