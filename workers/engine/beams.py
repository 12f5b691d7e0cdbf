"""Beam searches in the engine: a sequence for each beam; when all have drawn, the search says what they go on with.

A beam that is continued keeps its sequence, with slot and blocks; one that is continued twice is also taken over by a
sequence whose own beam is given up: they share its full blocks, and the last one is copied.

A search yields to others like any request. While one of its sequences waits for a slot or a block, those that have
drawn hold none: they would be in its way. What comes after them is admitted anew, and finds most of it in the prefix
cache. The sequences of a search come when it came: nobody who came later goes ahead of them.
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
    arrival: int  # of its first sequence
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
        search.tops[self._add(search, (), [])] = None

    def take(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """`deltas` of a step, with what its searches have found in place of what their sequences drew."""
        parts = self._parts.copy()  # a search may end in the middle of the step's deltas
        for delta in deltas:
            part = parts.get(delta.request_id)
            if part is None:
                yield delta
            elif delta.request_id in self._parts:
                yield from self._take(*part, delta)

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> list[Delta]:
        """The search, by any of its ids, is over without an answer; returns its last deltas."""
        search = self._by_id[request_id]
        self._release(search, reason)
        return self._over(search, [Delta(name, 0, finish=reason, error=error) for name in search.request.answer_ids])

    def fail_all(self, message: str) -> list[Delta]:
        """All searches are over with this error; returns their last deltas."""
        found: list[Delta] = []
        while self._by_id:
            found += self.end(next(iter(self._by_id)), FinishReason.ERROR, message)
        return found

    def _take(self, search: _Search, sequence: Sequence, delta: Delta) -> list[Delta]:
        if delta.finish is not None:
            return self.end(search.request.id, delta.finish, delta.error)
        search.prompt_logprobs = search.prompt_logprobs or delta.prompt_logprobs
        search.tops[sequence] = delta.logprobs[0].top
        tops = [top for top in search.tops.values() if top is not None]
        if len(tops) == len(search.tops):
            search.beams.advance(tops)
            if not search.beams.is_over:
                self._go_on(search)
                return []
            self._release(search, FinishReason.STOP)
            return self._over(search, self._answers(search))
        if any(top is None and s.phase is not Phase.ENDING for s, top in search.tops.items()):
            self._release(search, FinishReason.STOP, only_drawn=True)
        return []

    def _go_on(self, search: _Search) -> None:
        """Each running beam has a sequence that has all its tokens but the last planned, or waits."""
        before, search.tops = list(search.tops), {}
        parents = {before[beam.parent] for beam in search.beams.running}
        free = [s for s in before if s.id in self._parts and s not in parents]
        stay: list[tuple[Sequence, int]] = []
        for beam in search.beams.running:
            parent, token = before[beam.parent], beam.token_ids[-1]
            if parent.id in self._parts and parent not in search.tops:
                sequence = parent
                stay.append((parent, token))
            elif parent.id in self._parts and free:
                sequence = free.pop()
                self._roster.go_on(sequence, parent, token)
            else:
                sequence = self._add(search, beam.token_ids, parent.hashes)
            search.tops[sequence] = None
        for sequence, token in stay:  # after those that go on as they did
            self._roster.go_on(sequence, sequence, token)
        for sequence in free:
            self._finish(search, sequence, FinishReason.STOP)

    def _release(self, search: _Search, reason: FinishReason, *, only_drawn: bool = False) -> None:
        """Its sequences hold nothing; or those that have drawn."""
        for sequence, top in search.tops.items():
            if sequence.id in self._parts and (top is not None or not only_drawn):
                self._finish(search, sequence, reason)

    def _finish(self, search: _Search, sequence: Sequence, reason: FinishReason) -> None:
        del self._parts[sequence.id]
        if sequence.phase is not Phase.FINISHED:  # else by a fault
            self._roster.finish(sequence, reason)
        search.account(sequence)

    def _add(self, search: _Search, emitted: tuple[int, ...], hashes: list[bytes]) -> Sequence:
        """A sequence more waits."""
        request = replace(
            search.request,
            id=f"{search.request.id}~{search.sequences}",
            sampling=search.sampling,
            resumed_ids=emitted,
            beams=None,
        )
        arrival = search.arrival + search.sequences
        sequence = Sequence(request, arrival, self._context, self._roster.flow(request), is_part=True)
        sequence.limit = len(sequence.token_ids) + 1
        sequence.hashes = hashes.copy()
        search.sequences += 1
        self._parts[sequence.id] = search, sequence
        self._roster.add(sequence, search.since)
        return sequence

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
