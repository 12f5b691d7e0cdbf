"""Replicas as step loops under the virtual clock, and a run of requests through a dispatcher over them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from router.dispatch.dispatcher import Dispatcher, Reply
from router.dispatch.lease import Acquire, Granted, Outcome, Settle
from workers.api.replica import LoadReport

from .virtual import Clock, info


@dataclass
class Running:
    request: Acquire
    output: int
    granted: float
    expected_first: float
    prefill: int  # tokens to run
    done: int = 0  # tokens emitted
    first: float = 0.0


@dataclass
class VirtualEngine:
    """A step takes `base` + `per_seq` a decode + a prefill token in 1 / `rate`, all `slow` times as long."""

    name: str
    rate: float = 10_000.0
    base: float = 0.010
    per_seq: float = 0.0005
    chunk: int = 2048
    slow: float = 1.0
    steps: int = 0
    queue: list[Running] = field(default_factory=list)
    planned: tuple[list[tuple[Running, int]], list[Running]] | None = None
    seconds: float = 0.0

    def plan(self) -> float | None:
        """Seconds of the step that begins now; None if there is nothing to do."""
        prefills: list[tuple[Running, int]] = []
        budget = self.chunk
        for run in self.queue:
            if run.prefill and budget:
                prefills.append((run, min(run.prefill, budget)))
                budget -= prefills[-1][1]
        decodes = [run for run in self.queue if not run.prefill]
        if not prefills and not decodes:
            self.planned = None
            return None
        self.planned = (prefills, decodes)
        tokens = sum(n for _, n in prefills)
        self.seconds = self.slow * (self.base + self.per_seq * len(decodes) + tokens / self.rate)
        return self.seconds

    def commit(self) -> tuple[int, int, list[Running]]:
        """(prefill tokens, decode tokens, who got a token) of the step that was planned."""
        assert self.planned is not None
        prefills, decodes = self.planned
        emitted = list(decodes)
        for run, count in prefills:
            run.prefill -= count
            if not run.prefill:
                emitted.append(run)
        self.steps += 1
        return sum(n for _, n in prefills), len(decodes), emitted

    def report(self, prefill: int, decode: int) -> LoadReport:
        """After a commit and the next plan."""
        prefills, decodes = self.planned or ([], [])
        planned = sum(n for _, n in prefills)
        return LoadReport(
            self.steps, self.seconds_of_last, prefill, decode,
            running=len(self.queue),
            prefill_backlog=sum(run.prefill for run in self.queue) - planned,
            kv_tokens=0,
            planned_prefill=planned,
            planned_decode=len(decodes),
        )  # fmt: skip

    seconds_of_last: float = 0.0


class Run:
    """Requests at given times on `engines`, whose prefix caches hold what `cached` says."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        clock: Clock,
        engines: Iterable[VirtualEngine],
        *,
        cached: Callable[[VirtualEngine, Acquire], int] = lambda engine, request: 0,
        slots: int = 64,
    ) -> None:
        self.d, self.clock, self.cached = dispatcher, clock, cached
        self.engines = {e.name: e for e in engines}
        self.taken: Counter[str] = Counter()
        self.granted_at: list[tuple[float, str]] = []
        self.ttft: list[float] = []
        self.errors: list[float] = []  # of predictions, relative
        self.most: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._outputs: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        for e in self.engines.values():
            self.join(e, slots)
        self.at(clock.now, self._tick)

    def join(self, engine: VirtualEngine, slots: int = 64) -> None:
        self.engines[engine.name] = engine
        self._take(self.d.replica_up(info(engine.name, slots=slots, blocks=1_000_000, context=100_000)))

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def ask(self, when: float, request: Acquire, output: int) -> None:
        def acquire() -> None:
            self._outputs[request.lease_id], self._begun[request.lease_id] = output, self.clock.now
            answer = self.d.acquire("i", request)
            self._take([Reply("i", answer)] if answer is not None else [])

        self.at(when, acquire)

    def go(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.clock.now, _, what = heapq.heappop(self._events)
            what()

    def _tick(self) -> None:
        for engine in self.engines.values():
            if engine.planned is None:
                self._take(self.d.load(engine.name, engine.report(0, 0)))
        self._take(self.d.tick())
        self.at(self.clock.now + 0.1, self._tick)

    def _take(self, replies: list[Reply]) -> None:
        for reply in replies:
            granted = reply.message
            assert isinstance(granted, Granted), granted
            lease = self.d._leases.by_id[granted.lease_id]
            engine = self.engines[granted.replica.id]
            request = lease.request
            prefill = max(request.prompt_tokens - self.cached(engine, request), 1)
            engine.queue.append(
                Running(request, self._outputs[request.lease_id], self.clock.now, granted.first_seconds, prefill)
            )
            self.taken[engine.name] += 1
            self.granted_at.append((self.clock.now, engine.name))
            self.most[engine.name] = max(self.most[engine.name], len(engine.queue))
            if engine.planned is None:
                self._begin(engine)

    def _begin(self, engine: VirtualEngine) -> None:
        seconds = engine.plan()
        if seconds is not None:
            self.at(self.clock.now + seconds, lambda: self._end(engine))

    def _end(self, engine: VirtualEngine) -> None:
        prefill, decode, emitted = engine.commit()
        engine.seconds_of_last = engine.seconds
        ended = []
        for run in emitted:
            run.done += 1
            if run.done == 1:
                run.first = self.clock.now - run.granted
                self.ttft.append(self.clock.now - self._begun[run.request.lease_id])
                self.errors.append(abs(run.expected_first - run.first) / run.first)
            if run.done == run.output:
                engine.queue.remove(run)
                ended.append(run)
        self._begin(engine)
        self._take(self.d.load(engine.name, engine.report(prefill, decode)))
        for run in ended:
            settle = Settle(run.request.lease_id, Outcome.COMPLETED, output_tokens=run.done, first_seconds=run.first)
            self._take(self.d.settle(settle))
