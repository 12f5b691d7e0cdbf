"""Replicas behind the shipped dispatcher, under one virtual clock: arrivals, steps, reports and ticks are events."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig, Reply
from router.dispatch.lease import Acquire, Granted, Outcome, Refused, Settle
from router.dispatch.prefixes import prompt_hashes_now
from simulation.jobs import Job
from simulation.replica import BLOCK, Shape, VirtualReplica
from workers.api.ordering import Ordering, ServiceReport, ServiceSync
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo
from workers.api.request import Delta

MODEL = "m"
TICK = 0.1  # seconds between ticks of the dispatcher
IDLE_REPORT = 0.5  # seconds between reports of an engine that has nothing to do
CONTEXT = 131_072
MOST_NEWS = 4096  # blocks that one report tells of


class Machine(Protocol):
    """What serves the leases of one replica."""

    shape: Shape

    def submit(self, job: Job, now: float) -> None:
        """Serve it."""

    def step(self, now: float) -> tuple[float, list[Delta]]:
        """One step: its seconds, and what is there after them."""

    def load(self) -> LoadReport:
        """After the last step."""

    def news(self) -> CacheNews | None:
        """What its prefix cache gained and lost since the last call."""

    def service(self, now: float) -> ServiceReport | None:
        """What it executed, by account, if its steps have an order and it is time to tell."""

    def sync(self, message: ServiceSync) -> None:
        """What the cluster has served."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""


class EngineMachine(VirtualReplica):
    """The shipped engine."""

    def submit(self, job: Job, now: float) -> None:
        """To its engine."""
        self.now = now
        self.engine.submit(job.request())

    def load(self) -> LoadReport:
        """Its engine's own."""
        return self.engine.load()

    def news(self) -> CacheNews | None:
        """Its engine's own."""
        return self.engine.cache_news(MOST_NEWS)

    def service(self, now: float) -> ServiceReport | None:
        """Its ordering's own."""
        ordering = self.engine.ordering
        return None if ordering is None else ordering.report(now)

    def sync(self, message: ServiceSync) -> None:
        """To its ordering."""
        if self.engine.ordering is not None:
            self.engine.ordering.sync(message)

    @property
    def busy(self) -> bool:
        """Its engine has work."""
        return self.engine.has_work


@dataclass(slots=True)
class _Host:
    info: ReplicaInfo
    machine: Machine
    stepping: bool = False
    deltas: list[Delta] = field(default_factory=list)
    report: LoadReport | None = None
    reported: float = 0.0


class Cluster:
    """`shapes` replicas behind a dispatcher, which `clients` ingresses ask in turn.

    `hash_prompts`: requests tell the hashes of their blocks. `sync_every`: seconds between two messages that tell
    replicas whose steps have an `ordering` what the cluster has served. `context`: tokens of the longest sequence.
    """

    def __init__(
        self,
        config: DispatcherConfig,
        shapes: Iterable[Shape],
        *,
        seed: int = 0,
        make: Callable[[Shape, dict[int, Job]], Machine] | None = None,
        ordering: Callable[[int], Ordering] | None = None,
        hash_prompts: bool = False,
        sync_every: float = TICK,
        clients: int = 1,
        context: int = CONTEXT,
    ) -> None:
        self.now = 0.0
        self.jobs: dict[int, Job] = {}  # that hold a lease or wait for one
        self.dispatcher = Dispatcher(config, clock=lambda: self.now, rng=Random(seed))
        self.hosts: dict[str, _Host] = {}
        self.before_arrival: Callable[[Job], None] = lambda job: None
        self.on_end: Callable[[Job], None] = lambda job: None
        self.on_grant: Callable[[Job, Granted], None] = lambda job, granted: None
        self.most_waiting = 0
        self.steps = 0
        self.each_tick: list[Callable[[Cluster], None]] = []
        self.waiting: Counter[str] = Counter()  # requests without a lease, by user
        self._hash_prompts, self._sync_every, self._clients = hash_prompts, sync_every, clients
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._arrivals: Iterator[Job] = iter(())
        self._left = self._ordered = False
        for number, shape in enumerate(shapes):
            if make is not None:
                machine = make(shape, self.jobs)
            else:
                machine = EngineMachine(
                    shape, self.jobs, ordering=ordering(number) if ordering else None, books=ordering is not None
                )
            blocks = shape.pool // BLOCK
            info = ReplicaInfo(
                f"r{number}",
                MODEL,
                "h",
                1,
                min(context, shape.pool),
                shape.slots,
                blocks,
                BLOCK,
                max_num_batched_tokens=shape.budget,
            )
            self.hosts[info.id] = _Host(info, machine)
            self.dispatcher.replica_up(info)
            self.dispatcher.load(info.id, machine.load())
            if isinstance(machine, EngineMachine) and machine.engine.ordering is not None:
                self._ordered = True
                machine.engine.ordering.greet()
                self._tell_service(self.hosts[info.id])

    def at(self, when: float, what: Callable[[], None]) -> None:
        """`what` happens at `when`."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def run(self, jobs: Iterable[Job], *, until: float = math.inf) -> Cluster:
        """`jobs` come by their time of arrival; until all have ended, or a time."""
        self._arrivals = iter(jobs)
        self._left = True
        self._next_arrival()
        self.at(self.now + TICK, self._tick)
        if self._ordered:
            self.at(self.now + self._sync_every, self._sync)
        while self._events and (self._left or self.jobs) and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        ledger = self.dispatcher.ledger()
        assert ledger.balanced, ledger
        return self

    # events

    def _next_arrival(self) -> None:
        job = next(self._arrivals, None)
        if job is None:
            self._left = False
            return
        self.at(job.arrived, lambda: self._arrive(job))

    def _arrive(self, job: Job) -> None:
        self.jobs[job.number] = job
        self.waiting[job.user] += 1
        self.before_arrival(job)
        request = Acquire(
            job.name,
            MODEL,
            job.prompt,
            job.output,
            owner=job.user,
            tier=job.tier,
            route="chat",
            prompt=prompt_hashes_now(job.tokens(), BLOCK) if self._hash_prompts else None,
        )
        client = f"ingress{job.number % self._clients}"
        answer = self.dispatcher.acquire(client, request)
        if answer is not None:
            self._take((Reply(client, answer),))
        self._take(self.dispatcher.shed())
        self.most_waiting = max(self.most_waiting, self.dispatcher.waiting)
        self._next_arrival()

    def _tick(self) -> None:
        for host in self.hosts.values():
            if not host.stepping and self.now - host.reported >= IDLE_REPORT:
                host.reported = self.now
                self._take(self.dispatcher.load(host.info.id, host.machine.load()))
        self._take(self.dispatcher.tick())
        for look in self.each_tick:
            look(self)
        self.at(self.now + TICK, self._tick)

    def _sync(self) -> None:
        for host in self.hosts.values():
            self._tell_service(host)
        for replica_id, message in self.dispatcher.service_syncs():
            self.hosts[replica_id].machine.sync(message)
        self.at(self.now + self._sync_every, self._sync)

    def _tell_service(self, host: _Host) -> None:
        report = host.machine.service(self.now)
        if report is not None:
            self._take(self.dispatcher.service(host.info.id, report))

    def _stepped(self, host: _Host) -> None:
        """The step under way is over: what came of it is told, and the next one begins."""
        deltas, report = host.deltas, host.report
        host.deltas, host.report = [], None
        for delta in deltas:
            self._deliver(delta)
        if report is not None:
            host.reported = self.now
            news = host.machine.news() if self._hash_prompts else None
            if news is not None:
                self.dispatcher.cache(host.info.id, news)
            self._tell_service(host)
            self._take(self.dispatcher.load(host.info.id, report))
        if host.machine.busy:
            self.steps += 1
            seconds, host.deltas = host.machine.step(self.now)
            if seconds or host.deltas:
                host.report = host.machine.load()
            self.at(self.now + seconds, lambda: self._stepped(host))
        else:
            host.stepping = False

    def _deliver(self, delta: Delta) -> None:
        job = self.jobs[int(delta.request_id[1:])]
        if delta.token_ids:
            job.emit(len(delta.token_ids), self.now)
        if delta.finish is not None:
            settle = Settle(
                job.name,
                Outcome.COMPLETED,
                delta.executed_prefill,
                delta.executed_decode,
                delta.cached_tokens,
                job.emitted,
                first_seconds=0.0 if job.first is None or job.granted is None else job.first - job.granted,
            )
            replies = self.dispatcher.settle(settle)
            self._end(job)
            self._take(replies)

    def _take(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            message = reply.message
            job = self.jobs[int(message.lease_id[1:])]
            self.waiting[job.user] -= 1
            if isinstance(message, Granted):
                job.replica, job.granted = message.replica.id, self.now
                self.on_grant(job, message)
                host = self.hosts[job.replica]
                host.machine.submit(job, self.now)
                if not host.stepping:
                    host.stepping = True
                    self.at(self.now, lambda host=host: self._stepped(host))
            elif isinstance(message, Refused):
                job.refused = True
                self._end(job)

    def _end(self, job: Job) -> None:
        job.ended = self.now
        del self.jobs[job.number]
        self.on_end(job)
