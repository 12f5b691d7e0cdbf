"""Runs generation requests on the cluster: lease, submit, stream, and replay elsewhere when a replica dies.

Each request keeps a journal of the ids that every choice emitted. A replay is prefill(prompt + emitted) on another
replica, so each position reaches the reader once, whatever died.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from itertools import count
from time import monotonic

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import Acquire, Granted, LeaseLost, Outcome, Settle
from router.dispatch.prefixes import PromptHashes, prompt_hashes
from router.engine_link import EngineLinks, Stream
from router.generation import Batch, ChoiceDelta, GenerationRequest, Sink, Trace
from workers.api.errors import EngineFault, NoReplica, Overloaded, ReplicaLost
from workers.api.hashing import prompt_salt
from workers.api.request import INVALID, Delta, EngineRequest, FinishReason, SamplingParams

PROGRESS_TOKENS = 16  # new ones in an attempt: whatever ended it, the request did not die of the same thing again
VERDICT_SECONDS = 1.0  # before a request is called poison: a link that was only cut is back by then

log = logging.getLogger("echelon.sessions")


class _BadReplica(Exception):
    """This attempt failed through its replica; the request may go on elsewhere."""


@dataclass(slots=True)
class _Choice:
    """The journal of one choice."""

    sampling: SamplingParams
    emitted: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def take(self, delta: Delta) -> Delta | None:
        """What of `delta` is new; None if nothing is. Raises _BadReplica on a gap, and on an engine's error."""
        if self.finish is not None:
            return None
        known = len(self.emitted) - delta.position
        if known < 0:
            raise _BadReplica(f"{delta.request_id}: position {delta.position} came after {len(self.emitted)} tokens")
        if delta.finish is FinishReason.ERROR:
            raise _BadReplica(delta.error or "the engine gave no reason")
        if delta.finish is FinishReason.ABORT:  # ours never come back: an aborted sequence is forgotten at once
            raise _BadReplica("the engine aborted it")
        if known > 0:
            delta = replace(
                delta,
                position=len(self.emitted),
                token_ids=delta.token_ids[known:],
                logprobs=delta.logprobs[known:],
            )
        self.emitted += delta.token_ids
        self.finish = delta.finish
        return delta if delta.token_ids or delta.finish is not None else None

    def complete(self) -> FinishReason | None:
        """The finish that follows from what was emitted, when the replica died before it could say so."""
        if self.emitted and self.emitted[-1] in self.sampling.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.emitted) >= self.sampling.max_tokens else None


@dataclass(slots=True)
class _Run:
    """One generation request, over all its attempts."""

    request: GenerationRequest
    choices: list[_Choice]
    since: float
    left: int  # choices without a finish
    sink: Sink
    wanted: bool = True  # the sink's word
    accepted: bool = False
    attempt: int = 0
    fruitless: int = 0  # failed attempts since the last one that made progress; none whose replica left on purpose
    lost_on: tuple[str, ...] = ()  # replicas that went away in those
    excluded: tuple[str, ...] = ()
    errors: int = 0  # that engines declared
    prompt: PromptHashes | None = None

    def hand(self, batch: Batch) -> None:
        self.wanted = self.sink(batch)

    @property
    def unfinished(self) -> list[int]:
        return [i for i, c in enumerate(self.choices) if c.finish is None]

    def engine_requests(self, age: float) -> dict[str, tuple[EngineRequest, int]]:
        """By the ids of their deltas: what is to be run, and which choice it is for."""
        r = self.request
        if r.beams is None:
            found = [(i, self._engine_request(f"{r.id}/{i}#{self.attempt}", i, age)) for i in self.unfinished]
            return {asked.id: (asked, i) for i, asked in found}
        search = self._engine_request(f"{r.id}#{self.attempt}", 0, age)
        return {name: (search, i) for i, name in enumerate(search.answer_ids)}

    def _engine_request(self, name: str, i: int, age: float) -> EngineRequest:
        r, choice = self.request, self.choices[i]
        return EngineRequest(
            id=name,
            prompt_ids=r.prompt_ids,
            sampling=choice.sampling,
            resumed_ids=tuple(choice.emitted) if r.beams is None else (),  # a search begins anew
            owner=r.owner,
            tier=r.tier,
            age=age,
            salt=r.salt,
            adapter=r.adapter,
            grammar=r.grammar,
            beams=r.beams,
        )


@dataclass(slots=True)
class _Attempt:
    """One lease of a run, and its bill."""

    lease_id: str
    prompt_tokens: int
    outcome: Outcome = Outcome.ABORTED  # unless it comes to another end
    stream: Stream | None = None
    loss: LeaseLost | None = None  # what the dispatcher said
    prefill: int = 0
    decode: int = 0
    cached: int = 0
    preemptions: int = 0
    granted_at: float = 0.0
    waited: float = 0.0  # seconds by then, as the dispatcher counts them
    first_seconds: float = 0.0  # from the grant to the first token; 0: none came
    numbers: dict[str, int] = field(default_factory=dict)  # of the choices, by the ids of their sequences
    starts: dict[int, int] = field(default_factory=dict)  # tokens that each choice had before
    unbilled: set[int] = field(default_factory=set)  # choices whose last delta has not come

    def bill(self, i: int, delta: Delta) -> None:
        """The last delta of choice `i`."""
        self.unbilled.discard(i)
        self.prefill += delta.executed_prefill
        self.decode += delta.executed_decode
        self.cached += delta.cached_tokens
        self.preemptions += delta.preemptions

    def lost(self, loss: LeaseLost) -> None:
        self.loss = loss
        if self.stream is not None:
            self.stream.fail(self.loss_error(loss))

    def progress(self, choices: list[_Choice]) -> int:
        """The most tokens that a choice got here."""
        return max((len(choices[i].emitted) - start for i, start in self.starts.items()), default=0)

    @staticmethod
    def loss_error(loss: LeaseLost) -> ReplicaLost:
        return ReplicaLost(f"replica {loss.replica_id} was taken out: {loss.reason}")

    def settle(self, choices: list[_Choice]) -> Settle:
        """The bill; of sequences that never got their last delta, what they must at least have cost."""
        made = {i: len(choices[i].emitted) - start for i, start in self.starts.items()}
        unbilled = sum(made[i] for i in self.unbilled)
        prefill = self.prefill + (self.prompt_tokens if unbilled and not self.prefill else 0)
        return Settle(
            self.lease_id,
            self.outcome,
            prefill_tokens=prefill,
            decode_tokens=self.decode + unbilled,
            cached_tokens=self.cached,
            output_tokens=sum(made.values()),
            first_seconds=self.first_seconds,
            preemptions=self.preemptions,
        )


class Sessions:
    """The `Generator` of an ingress replica; owns its connections to the dispatcher and to the engines.

    A request is replayed at most `max_replays` times, and one that `poison_deaths` replicas died of is not replayed:
    both without progress between. A long stream outlives any number of faults, and replicas that were taken out on
    purpose do not count.
    """

    def __init__(
        self, dispatcher: DispatcherClient, links: EngineLinks, *, max_replays: int = 3, poison_deaths: int = 2
    ) -> None:
        self.dispatcher, self.links = dispatcher, links
        self._max_replays, self._poison_deaths = max_replays, poison_deaths
        self._lease_numbers = count()
        self.running = 0  # requests between their first step and their end
        self.replays = 0  # since the start

    async def close(self) -> None:
        """All connections are closed; streams that still run fail with ReplicaLost."""
        await self.dispatcher.close()
        await self.links.close()

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        """See `router.generation.Generator`; the first batch is empty and says that a replica has the request."""
        run = _Run(request, [_Choice(s) for s in request.samplings], monotonic(), len(request.samplings), sink)
        self.running += 1
        try:
            while run.left and run.wanted:
                attempt = _Attempt(f"{self.dispatcher.name}/{next(self._lease_numbers)}", len(request.prompt_ids))
                granted = await self._lease(run, attempt)
                try:
                    attempt.stream = await self._submit(run, attempt, granted)
                    if not run.accepted:
                        run.accepted = True
                        run.hand(())
                    if run.wanted:
                        await attempt.stream.ended()
                    if not run.left:
                        attempt.outcome = Outcome.COMPLETED
                except (ReplicaLost, _BadReplica) as e:
                    attempt.outcome = Outcome.LOST if isinstance(e, ReplicaLost) else Outcome.FAILED
                    await self._after_fault(run, attempt, granted, e)
                except EngineFault:
                    attempt.outcome = Outcome.FAILED
                    raise
                finally:
                    if attempt.stream is not None:
                        attempt.stream.close()
                    self.dispatcher.settle(attempt.settle(run.choices))
                ended = self._finish_complete(run) if run.wanted else ()
                if ended:
                    run.hand(ended)
        finally:
            self.running -= 1

    async def _lease(self, run: _Run, attempt: _Attempt) -> Granted:
        request, unfinished = run.request, run.unfinished
        handover, trace = request.handover, request.trace
        if handover is not None and handover.granted is not None and not run.attempt:
            attempt.lease_id, handover.on_lost = handover.lease_id, attempt.lost
            return self._granted(attempt, trace, handover.granted, run.attempt)
        if run.prompt is None:
            run.prompt = await self._hashes(request, resumed=any(c.emitted for c in run.choices))
        ask = Acquire(
            lease_id=attempt.lease_id,
            model=request.model,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=max(run.choices[i].sampling.max_tokens for i in unfinished),
            choices=len(unfinished),
            owner=request.owner,
            tier=request.tier,
            sub=request.sub,
            name=request.id,
            route=request.route,
            resumed_tokens=sum(len(run.choices[i].emitted) for i in unfinished),
            accepted=run.accepted,
            age=monotonic() - run.since,
            excluded=run.excluded,
            prompt=run.prompt,
            priority=request.priority,
        )
        asked = monotonic()
        try:
            granted = await self.dispatcher.acquire(ask, attempt.lost)
            return self._granted(attempt, trace, granted, run.attempt)
        except Overloaded as e:
            if run.accepted:  # too late to be refused
                raise ReplicaLost(f"its replica died and there is no other: {e}") from e
            raise
        finally:
            trace.queue_seconds += monotonic() - asked

    @staticmethod
    def _granted(attempt: _Attempt, trace: Trace, granted: Granted, replays: int) -> Granted:
        trace.replica, trace.replays = granted.replica.id, replays
        trace.expected_first, trace.first_seconds = granted.first_seconds, 0.0
        attempt.granted_at, attempt.waited = monotonic(), granted.waited_seconds
        return granted

    async def _hashes(self, request: GenerationRequest, *, resumed: bool) -> PromptHashes | None:
        """For the block size of the replicas, and salted as there; None where none is known yet, where the prompt is
        shorter than a block, and where its tokens are run for their log-probabilities.
        """
        info = next((r.info for r in self.dispatcher.rows if r.info.model == request.model), None)
        length = len(request.prompt_ids)
        if info is None or not 0 < info.block_size < length:
            return None
        if not resumed and any(s.prompt_logprobs is not None for s in request.samplings):
            return None
        salt = prompt_salt(request.salt, length, info.prompts_apart_from)
        return await prompt_hashes(request.prompt_ids, info.block_size, salt=salt, adapter=request.adapter)

    async def _submit(self, run: _Run, attempt: _Attempt, granted: Granted) -> Stream:
        link = await self.links.get(granted.replica)
        if attempt.loss is not None:
            raise attempt.loss_error(attempt.loss)
        age = attempt.waited + monotonic() - attempt.granted_at
        asked = run.engine_requests(age)
        attempt.numbers = {name: i for name, (_, i) in asked.items()}
        attempt.starts = {i: len(request.resumed_ids) for request, i in asked.values()}
        attempt.unbilled = set(attempt.starts)

        def take(deltas: tuple[Delta, ...]) -> bool:
            if not run.request.trace.first_seconds:
                run.request.trace.first_seconds = monotonic() - attempt.granted_at
                if run.request.beams is None:  # whose first tokens come with its last
                    attempt.first_seconds = run.request.trace.first_seconds
            batch, fault = self._new(run, attempt, deltas)
            if batch:
                run.hand(batch)
            if fault is not None and run.wanted:
                raise fault
            return run.wanted and run.left > 0

        return link.submit(list({request.id: request for request, _ in asked.values()}.values()), take)

    @staticmethod
    def _new(run: _Run, attempt: _Attempt, deltas: tuple[Delta, ...]) -> tuple[Batch, _BadReplica | None]:
        """What is new in one step's deltas, and the fault that one of them brought, if any."""
        batch: list[ChoiceDelta] = []
        fault: _BadReplica | None = None
        for delta in deltas:
            i = attempt.numbers[delta.request_id]
            try:
                new = run.choices[i].take(delta)
            except _BadReplica as e:
                fault = fault or e
                continue
            if new is None:
                continue
            if new.finish is not None:
                run.left -= 1
                attempt.bill(i, new)
            batch.append(ChoiceDelta(i, new))
        return tuple(batch), fault

    async def _after_fault(self, run: _Run, attempt: _Attempt, granted: Granted, fault: Exception) -> None:
        """The run may try again; otherwise EngineFault, ReplicaLost or (not accepted yet) NoReplica rises."""
        request, replica = run.request, granted.replica.id
        log.warning("request %s: attempt %d on %s failed: %s", request.id, run.attempt, replica, fault)
        if attempt.progress(run.choices) >= PROGRESS_TOKENS:
            run.fruitless, run.lost_on, run.errors, run.excluded = 0, (), 0, ()
        if isinstance(fault, _BadReplica):
            run.errors += 1
            # An engine that calls a request invalid is right on every replica; two engines that fail alike are, too.
            if str(fault).startswith(INVALID) or run.errors > 1:
                raise EngineFault(str(fault)) from fault
        elif attempt.stream is not None and (attempt.loss is None or attempt.loss.died):
            run.lost_on = (*run.lost_on, replica)
            deaths = await self._deaths(run)
            if deaths >= self._poison_deaths:
                raise EngineFault(
                    f"{deaths} replicas died while they ran this request; it is not tried again"
                ) from fault
        run.attempt += 1
        run.fruitless += attempt.loss is None or attempt.loss.died
        if run.fruitless > self._max_replays:
            if not run.accepted:
                raise NoReplica(f"no replica could be reached: {fault}") from fault
            raise ReplicaLost(f"given up after {self._max_replays} replays: {fault}") from fault
        run.excluded = (*run.excluded, replica)
        self.replays += 1

    async def _deaths(self, run: _Run) -> int:
        """How many replicas the request may have killed. A cut link is no death: that replica comes back as itself."""
        if len(run.lost_on) >= self._poison_deaths:
            await asyncio.sleep(VERDICT_SECONDS)
        here = {row.info.id for row in self.dispatcher.rows}
        return sum(replica not in here for replica in run.lost_on)

    @staticmethod
    def _finish_complete(run: _Run) -> tuple[ChoiceDelta, ...]:
        """Last deltas of choices that have all they may have, though their replica died before it said so."""
        ended = []
        for i in run.unfinished:
            choice = run.choices[i]
            choice.finish = choice.complete()
            if choice.finish is not None:
                run.left -= 1
                delta = Delta(f"{run.request.id}/{i}#{run.attempt}", len(choice.emitted), finish=choice.finish)
                ended.append(ChoiceDelta(i, delta))
        return tuple(ended)
