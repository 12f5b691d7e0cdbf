"""Every live request and where it is: it waits in the queue, or it is resident with a slot and blocks."""

from __future__ import annotations

from workers.api.config import EngineConfig
from workers.api.ordering import Ordering
from workers.api.request import Delta, EngineRequest, FinishReason, TokenLogprobs
from workers.engine.block_pool import BlockPool
from workers.engine.host_blocks import HostBlocks
from workers.engine.plan import NewSequence
from workers.engine.prefix_cache import PrefixCache
from workers.engine.queue import WaitingQueue
from workers.engine.residents import Residents
from workers.engine.sequence import Flow, Phase, Sequence
from workers.engine.stats import Stats


class Roster:
    """The state that planning and committing share. Each method is one move of one sequence, with its bookkeeping.

    Without an `ordering`, which is told of every move, all requests are in one flow.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        ordering: Ordering | None,
        num_host_blocks: int = 0,
        prompts_apart_from: int | None = None,
    ) -> None:
        self.block_size = config.block_size
        self.pool = BlockPool(num_blocks)
        self.host = HostBlocks(num_host_blocks)
        self.cache = PrefixCache(
            self.pool,
            config.block_size,
            enabled=config.prefix_caching,
            host=self.host,
            prompts_apart_from=prompts_apart_from,
        )
        self.residents = Residents(self.pool, config.block_size, config.max_num_seqs)
        self.ordering = ordering
        self.queue = WaitingQueue()
        self.stats = Stats()
        self.live: dict[str, Sequence] = {}
        self.backlog = 0  # known tokens that are not planned, of waiting and part-done sequences
        self.in_flight = 0  # steps planned and not committed
        self.grammars = 0  # live requests that have one
        self.searches = self.parts = 0  # live beam searches, and the live sequences that are parts of them

    @property
    def num_requests(self) -> int:
        """How many are live; a beam search is one."""
        return len(self.live) - self.parts + self.searches

    def flow(self, request: EngineRequest) -> Flow:
        """Where the request belongs."""
        return self.queue.flow(None if self.ordering is None else self.ordering.flow(request))

    def add(self, sequence: Sequence, since: float) -> None:
        """An accepted request waits; it first came at `since`."""
        self.live[sequence.id] = sequence
        self.parts += sequence.is_part
        self.stats.accepted += not sequence.is_part
        self.grammars += sequence.grammar is not None
        self._wait(sequence)
        if self.ordering is not None:
            self.ordering.arrived(sequence.flow.handle, sequence.id, since)

    def admit(self, sequence: Sequence, hits: list[int]) -> NewSequence:
        """The head of its flow is resident; `hits` are its blocks from the prefix cache."""
        flow = sequence.flow
        taken = self.queue.pop(flow)
        assert taken is sequence, f"{sequence} is admitted before {taken}"
        flow.residents[sequence] = None
        if self.ordering is not None:
            self.ordering.admitted(flow.handle)
        copied = self.host.copied_in
        new = self.residents.enter(sequence, hits, self.cache)
        found, prompt = sequence.planned, sequence.num_prompt
        self.backlog -= found
        if self.cache.enabled and not sequence.preemptions and not (sequence.is_part and sequence.request.resumed_ids):
            self.stats.prefix_queries += len(sequence.token_ids)
            self.stats.prefix_hits += found
            self.stats.host_hits += (self.host.copied_in - copied) * self.block_size
        if found > sequence.accounted:
            sequence.cached += min(found, prompt) - min(sequence.accounted, prompt)
            sequence.accounted = found
        return new

    def preempt(self, sequence: Sequence) -> None:
        """It loses slot and blocks and waits at the head of its flow, to be computed again from what is known, less
        what the prefix cache, or the host, has of it when it comes back.

        A token of it in flight is still taken when that step is committed.
        """
        if sequence.phase is Phase.PREFILL:
            self.backlog -= len(sequence.token_ids) - sequence.planned
        self._leave(sequence)
        sequence.preemptions += 1
        self.stats.preemptions += 1
        sequence.phase = Phase.WAITING
        del sequence.flow.residents[sequence]
        self._wait(sequence)
        if self.ordering is not None:
            self.ordering.evicted(sequence.flow.handle)

    def put_off(self, sequence: Sequence) -> None:
        """The token that its decode in flight was to draw is not drawn: the next plan runs that position again."""
        self.residents.put_back(sequence)
        self.stats.put_off += 1

    def go_on(self, sequence: Sequence, source: Sequence, token: int) -> None:
        """A part of a beam search, whose draw is known, goes on: see `Residents.go_on`."""
        self.residents.go_on(sequence, source, token)
        self.backlog += 1

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
    ) -> Delta:
        """It is not live any more and holds nothing; returns its terminal delta. What it has in flight is discarded.

        `token_ids` are its last tokens, known already but not yet handed out.
        """
        flow, waited = sequence.flow, sequence.phase is Phase.WAITING
        if waited:
            self.backlog -= len(sequence.token_ids)
            sequence.phase = Phase.FINISHED
            self.queue.discard(sequence)
        else:
            if sequence.phase is Phase.PREFILL:
                self.backlog -= len(sequence.token_ids) - sequence.planned
            self._leave(sequence)
            sequence.phase = Phase.FINISHED
            del flow.residents[sequence]
        if self.ordering is not None:
            self.ordering.ended(flow.handle, sequence.id, resident=not waited)
        self.queue.forget(flow)
        del self.live[sequence.id]
        self.grammars -= sequence.grammar is not None
        self.parts -= sequence.is_part
        if not sequence.is_part:
            self.stats.count_finish(reason)
        return Delta(
            request_id=sequence.id,
            position=sequence.num_emitted - len(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            finish=reason,
            error=error,
            cached_tokens=sequence.cached,
            executed_prefill=sequence.executed_prefill,
            executed_decode=sequence.executed_decode,
            preemptions=sequence.preemptions,
        )

    def _leave(self, sequence: Sequence) -> None:
        self.cache.settle()  # ahead of its blocks' release
        self.residents.leave(sequence)

    def _wait(self, sequence: Sequence) -> None:
        self.backlog += len(sequence.token_ids)
        self.queue.push(sequence)
