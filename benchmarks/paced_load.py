"""Open-loop load of exact streams, and what became of each; for `upgrade.py`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from exact_streams import Ask, Client, Expected, make_asks, references, run_streams

CAPACITY_SECONDS = 12.0
CAPACITY_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream: when it began and how long it took, in seconds, and what was wrong with it; "" if nothing."""

    began: float
    seconds: float
    wrong: str


@dataclass(slots=True)
class Load:
    """Greedy requests against `base_url`, each compared with its answer before the load."""

    client: Client
    asks: Sequence[Ask]
    expected: Sequence[Expected]
    rng: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    in_flight: int = 0

    @classmethod
    async def prepared(cls, base_url: str, seed: int, shapes: int = 12) -> Load:
        """With its references."""
        client = Client(base_url)
        asks = make_asks(seed, shapes)
        return cls(client, asks, await references(client, asks), random.Random(seed))

    async def capacity(self) -> float:
        """Streams a second that the cluster serves when always some wait."""
        ends: list[str] = []
        began = time.monotonic()
        await run_streams(
            self.client, self.asks, self.expected, streams=CAPACITY_STREAMS, seconds=CAPACITY_SECONDS, ended=ends.append
        )
        if any(ends):
            raise RuntimeError(f"the cluster is not exact without any disturbance: {next(filter(None, ends))}")
        return len(ends) / (time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def at(self, rate: float) -> AsyncIterator[None]:
        """Streams begin `rate` times a second, whatever becomes of them; at the end of the block all have ended."""
        running: set[asyncio.Task[None]] = set()
        stop = asyncio.Event()

        async def begin() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), self.rng.expovariate(rate))
                    return
                task = asyncio.create_task(self._one(self.rng.randrange(len(self.asks))))
                running.add(task)
                task.add_done_callback(running.discard)

        beginner = asyncio.create_task(begin())
        try:
            yield
        finally:
            stop.set()
            await beginner
            await asyncio.gather(*running)

    @contextlib.asynccontextmanager
    async def crowd(self, streams: int) -> AsyncIterator[None]:
        """So many streams at once, one after the other each; at the end of the block all have ended."""
        stop = asyncio.Event()

        async def one() -> None:
            while not stop.is_set():
                await self._one(self.rng.randrange(len(self.asks)))

        crowd = [asyncio.create_task(one()) for _ in range(streams)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*crowd)

    async def _one(self, i: int) -> None:
        began = time.monotonic()
        self.in_flight += 1
        wrong = await self.client.stream(self.asks[i], self.expected[i])
        self.in_flight -= 1
        self.outcomes.append(Outcome(began, time.monotonic() - began, wrong))

    def summary(self, since: float) -> dict[str, Any]:
        """Of the streams that ended since then (time.monotonic)."""
        ended = [o for o in self.outcomes if o.began + o.seconds >= since]
        seconds = sorted(o.seconds for o in ended)
        return {
            "streams": len(ended),
            "errors": sum(bool(o.wrong) for o in ended),
            "seconds_p50": round(statistics.median(seconds), 2) if seconds else None,
            "seconds_max": round(seconds[-1], 2) if seconds else None,
        }

    @property
    def faults(self) -> list[str]:
        """What was wrong, of each that was."""
        return [o.wrong for o in self.outcomes if o.wrong]
