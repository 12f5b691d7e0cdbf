"""Every step of every replica, heard like the dispatcher hears it: what it ran, how long it took, whom it served."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Self

from live.cluster import table
from router.dispatch.observer import Observer
from workers.api.ordering import Service, ServiceReport
from workers.api.replica import CacheNews, LoadReport

LOOK_SECONDS = 0.5  # between two looks for new replicas
PATIENCE = 60.0


class StepWatch:
    """Listens in an `async with` block. `steps`: (seconds of `time.perf_counter`, replica, load) of each step."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._observers: dict[str, Observer] = {}
        self._task: asyncio.Task[None] | None = None
        self.steps: list[tuple[float, str, LoadReport]] = []
        self.last: dict[str, LoadReport] = {}  # by replica, those that are gone too
        self.served: dict[str, dict[tuple[str, ...], Service]] = defaultdict(dict)  # by replica, then account
        self.service: list[
            tuple[float, dict[str, float], set[str]]
        ] = []  # (when, units by user, users that wait there)

    async def __aenter__(self) -> Self:
        """All replicas that stand are heard."""
        await self._look()
        self._task = asyncio.create_task(self._follow(), name="step watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        """No more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(o.close() for o in self._observers.values()))

    def between(self, began: float, ended: float) -> list[LoadReport]:
        """The steps of that time."""
        return [load for at, _, load in self.steps if began <= at <= ended]

    def longest(self, began: float, ended: float) -> float:
        """Seconds of the longest step of that time."""
        return max((load.step_seconds for load in self.between(began, ended)), default=0.0)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        for row in (await asyncio.to_thread(table)).rows:
            if row.info.id not in self._observers:
                self._observers[row.info.id] = Observer(
                    row.info, secret=self._secret, name="observer/benchmark", watcher=self, patience=PATIENCE
                )

    # router.dispatch.observer.Watcher

    def replica_seen(self, replica_id: str) -> None:
        self.last.setdefault(replica_id, LoadReport(-1))

    def replica_load(self, replica_id: str, load: LoadReport) -> None:
        if load.step != self.last[replica_id].step:
            self.steps.append((time.perf_counter(), replica_id, load))
        self.last[replica_id] = load

    def replica_service(self, replica_id: str, report: ServiceReport) -> None:
        self.served[replica_id].update({row.key: row for row in report.accounts})
        units: dict[str, float] = defaultdict(float)
        for accounts in self.served.values():
            for key, row in accounts.items():
                units[key[1]] += row.units
        self.service.append((time.perf_counter(), dict(units)))

    def replica_cache(self, replica_id: str, news: CacheNews) -> None:
        pass  # of no interest here

    def replica_canary(self, replica_id: str, fault: str | None) -> None:
        pass  # none are sent from here

    def replica_unseen(self, replica_id: str, reason: str) -> None:
        pass  # the observer dials again

    def replica_given_up(self, replica_id: str, reason: str) -> None:
        pass  # it is gone; what it ran stays counted
