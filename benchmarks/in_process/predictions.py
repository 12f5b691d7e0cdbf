"""The dispatcher's predicted first token against the actual one, on this device and in real time.

The shipped dispatcher in this thread, an engine that it learns from in another, as a replica has it. Requests with W3's
lengths come at random; of each the seconds from the grant of its lease to its first token are predicted at the grant.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from random import Random

from live.figures import Figure, median
from simulation.jobs import Job
from simulation.traffic import chats

from in_process.feed import Plant, requests_of
from router.dispatch.dispatcher import Dispatcher, DispatcherConfig, Reply
from router.dispatch.lease import Acquire, Granted, Outcome, Settle
from workers.api.replica import LoadReport, ReplicaInfo
from workers.api.request import Delta, EngineRequest
from workers.engine.core import Engine

ERROR = 0.15  # of the actual seconds, that a prediction may be wrong by
LEARNED = 3.0  # seconds from the start, before anything is known, that do not count
TICK = 0.1  # seconds between ticks of the dispatcher
_MODEL, _REPLICA = "m", "r0"

News = tuple[float, list[Delta], LoadReport]  # when a step was committed, and what came of it


class _Stepper(threading.Thread):
    """Steps an engine as long as it has work; ends when it is told None and all is done."""

    def __init__(self, engine: Engine, news: queue.SimpleQueue[News]) -> None:
        super().__init__(daemon=True)
        self.requests: queue.SimpleQueue[EngineRequest | None] = queue.SimpleQueue()
        self._engine, self._news = engine, news

    def run(self) -> None:
        engine, more = self._engine, True
        while more or engine.has_work:
            while more and not (engine.has_work and self.requests.empty()):
                request = self.requests.get()
                if request is None:
                    more = False
                else:
                    engine.submit(request)
            deltas = engine.step() if engine.has_work else []
            self._news.put((time.perf_counter(), deltas, engine.load()))


def measure(plant: Plant, *, rates: Sequence[float], seconds: float, divide: int) -> Iterator[list[Figure]]:
    """Figures of each rate, in requests a second, each for so many seconds; lengths are divided by `divide`."""
    for rate in rates:
        jobs = list(chats(1, rate, number=round(rate * seconds)))
        for job in jobs:
            job.prompt, job.output = -(-job.prompt // divide), -(-job.output // divide)
        _serve(plant, jobs)
        counted = [j for j in jobs if j.arrived >= LEARNED and j.first is not None and j.granted is not None]
        pairs = [(j.predicted, (j.first or 0.0) - (j.granted or 0.0)) for j in counted]
        yield [
            median(f"{rate:g} a second: first token from the grant", [1e3 * actual for _, actual in pairs], "ms"),
            median(f"{rate:g} a second: predicted by actual", [told / actual for told, actual in pairs]),
            median(f"{rate:g} a second: error", [abs(told - actual) / actual for told, actual in pairs], "", ERROR),
        ]


def _serve(plant: Plant, jobs: Sequence[Job]) -> None:
    """All of them, each when it is due."""
    engine, size = plant.fresh_engine(), plant.size
    began = time.perf_counter()
    dispatcher = Dispatcher(
        DispatcherConfig(recovery=0.0, canary_every=math.inf), clock=lambda: time.perf_counter() - began, rng=Random(0)
    )
    limits = (size.max_num_seqs, plant.blocks, size.block_size)
    dispatcher.replica_up(
        ReplicaInfo(
            _REPLICA, _MODEL, "h", 1, plant.context, *limits, max_num_batched_tokens=size.max_num_batched_tokens
        )
    )
    dispatcher.load(_REPLICA, engine.load())
    news: queue.SimpleQueue[News] = queue.SimpleQueue()
    stepper = _Stepper(engine, news)
    stepper.start()
    by_name = {job.name: job for job in jobs}
    requests = {r.id: r for r in requests_of(jobs, plant.vocab_size)}

    def take(replies: Sequence[Reply]) -> None:
        for message in (reply.message for reply in replies):
            if not isinstance(message, Granted):
                raise SystemExit(f"{message.lease_id} got no lease: {message}")
            job = by_name[message.lease_id]
            job.granted, job.predicted = time.perf_counter() - began, message.first_seconds
            stepper.requests.put(requests[job.name])

    coming, left, ticked = list(jobs)[::-1], len(jobs), 0.0
    while left:
        now = time.perf_counter() - began
        while coming and coming[-1].arrived <= now:
            job = coming.pop()
            answer = dispatcher.acquire("c", Acquire(job.name, _MODEL, job.prompt, job.output, owner=job.user))
            take([Reply("c", answer)] if answer is not None else [])
        if now - ticked >= TICK:
            ticked = now
            take(dispatcher.tick())
        until = min(ticked + TICK, coming[-1].arrived) if coming else ticked + TICK
        try:
            at, deltas, report = news.get(timeout=max(1e-4, until - (time.perf_counter() - began)))
        except queue.Empty:
            continue
        for delta in deltas:
            job = by_name[delta.request_id]
            if delta.token_ids:
                job.emit(len(delta.token_ids), at - began)
            if delta.finish is not None:
                left -= 1
                first = 0.0 if job.first is None or job.granted is None else job.first - job.granted
                done = (delta.executed_prefill, delta.executed_decode, delta.cached_tokens, job.emitted)
                take(dispatcher.settle(Settle(job.name, Outcome.COMPLETED, *done, first_seconds=first)))
        take(dispatcher.load(_REPLICA, report))
    stepper.requests.put(None)
    stepper.join()
    engine.check_ledgers()
