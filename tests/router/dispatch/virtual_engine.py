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
    prefill: int  # tokens that no step has taken yet
    due: int = 0  # tokens that steps so far will have emitted
    done: int = 0  # tokens emitted
    first: float = 0.0


@dataclass(frozen=True)
class Step:
    prefill: int  # tokens
    decodes: int
    emits: list[Running]
    seconds: float


@dataclass
class VirtualEngine:
    """A step takes `base` + `per_seq` a decode + a prefill token in 1 / `rate`, all `slow` times as long.

    It plans one step ahead: when one begins, the next one is closed.
    """

    name: str
    rate: float = 10_000.0
    base: float = 0.010
    per_seq: float = 0.0005
    chunk: int = 2048
    slow: float = 1.0
    steps: int = 0
    queue: list[Running] = field(default_factory=list)
    under_way: Step | None = None
    closed: Step | None = None

    def plan(self) -> Step | None:
        """The step after all that are planned; None if there is nothing to do."""
        emits = [run for run in self.queue if 0 < run.due < run.output]
        decodes, tokens = len(emits), 0
        for run in self.queue:
            count = min(run.prefill, self.chunk - tokens)
            tokens += count
            run.prefill -= count
            if count and not run.prefill:
                emits.append(run)
        if not emits and not tokens:
            return None
        for run in emits:
            run.due += 1
        return Step(tokens, decodes, emits, self.slow * (self.base + self.per_seq * decodes + tokens / self.rate))

    def report(self, ended: Step | None) -> LoadReport:
        """After the end of a step, with the next one under way and no other planned yet."""
        last, now = ended or Step(0, 0, [], 0.0), self.under_way or Step(0, 0, [], 0.0)
        return LoadReport(
            self.steps, last.seconds, last.prefill, last.decodes,
            running=len(self.queue),
            prefill_backlog=sum(run.prefill for run in self.queue),
            kv_tokens=0,
            planned_prefill=now.prefill,
            planned_decode=now.decodes,
        )  # fmt: skip


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
            if engine.under_way is None:
                self._take(self.d.load(engine.name, engine.report(None)))
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
            if engine.under_way is None:
                self._begin(engine)
                engine.closed = engine.plan()

    def _begin(self, engine: VirtualEngine) -> None:
        engine.under_way, engine.closed = engine.closed or engine.plan(), None
        if engine.under_way is not None:
            self.at(self.clock.now + engine.under_way.seconds, lambda: self._end(engine))

    def _end(self, engine: VirtualEngine) -> None:
        step = engine.under_way
        assert step is not None
        engine.steps += 1
        ended = []
        for run in step.emits:
            run.done += 1
            if run.done == 1:
                run.first = self.clock.now - run.granted
                self.ttft.append(self.clock.now - self._begun[run.request.lease_id])
                self.errors.append(abs(run.expected_first - run.first) / run.first)
            if run.done == run.output:
                engine.queue.remove(run)
                ended.append(run)
        self._begin(engine)
        report = engine.report(step)
        engine.closed = engine.plan()
        self._take(self.d.load(engine.name, report))
        for run in ended:
            settle = Settle(run.request.lease_id, Outcome.COMPLETED, output_tokens=run.done, first_seconds=run.first)
            self._take(self.d.settle(settle))
