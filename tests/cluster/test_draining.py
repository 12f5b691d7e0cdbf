"""A replica leaves: it waits for what runs, no longer than it may, and goes only when nobody is on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster import draining
from cluster.draining import leave
from workers.api.replica import ReplicaInfo

INFO = ReplicaInfo("r0", "m", "host", 1, 4096, 8, num_blocks=64, block_size=16)


class Site:
    """A dispatcher's actor and a gang in one: `leases` on the replica, `sequences` in its engine."""

    def __init__(self, leases: int = 0, sequences: int = 0) -> None:
        self.leases, self.running = leases, sequences
        self.said: list[str] = []
        self.away = False
        self.slow_to_leave = 0  # questions after the farewell until the engine is empty

    async def find(self) -> Any:
        if self.away:
            raise ConnectionError("no dispatcher")
        return Dispatcher(self)

    async def sequences(self) -> int:
        if "unregister" in self.said and self.running:
            self.slow_to_leave -= 1
            if self.slow_to_leave < 0:
                self.running = 0
        self.said.append(f"sequences {self.running}")
        return self.running


class Dispatcher:
    def __init__(self, site: Site) -> None:
        self.drain, self.unregister = Remote(self._drain), Remote(self._unregister)
        self.site = site

    async def _drain(self, info: ReplicaInfo) -> int:
        self.site.said.append("drain")
        return self.site.leases

    async def _unregister(self, replica_id: str, reason: str) -> None:
        self.site.said.append("unregister")
        self.site.leases = 0


class Remote:
    def __init__(self, call: Any) -> None:
        self.remote = call


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(draining, "FAREWELL_SECONDS", 0.05)


def leaving(site: Site, limit: float) -> asyncio.Task[int]:
    return asyncio.create_task(leave(INFO, site, find=site.find, limit=limit, reason="upgraded"))


async def until_said(site: Site, what: str, times: int) -> None:
    while site.said.count(what) < times:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_it_waits_for_leases_and_sequences() -> None:
    site = Site(leases=2, sequences=1)
    task = leaving(site, limit=60.0)
    await until_said(site, "drain", 3)
    site.leases = 0
    await until_said(site, "sequences 1", site.said.count("sequences 1") + 3)
    assert "unregister" not in site.said
    site.running = 0
    assert await task == 0
    assert site.said.index("unregister") > site.said.index("drain")


async def test_what_runs_at_the_limit_is_moved_before_the_ranks_may_go() -> None:
    site = Site(leases=2, sequences=2)
    site.slow_to_leave = 5
    assert await leaving(site, limit=0.02) == 2
    assert site.said.count("unregister") == 1
    after = site.said[site.said.index("unregister") + 1 :]
    assert after == ["sequences 2"] * 5 + ["sequences 0"]


async def test_an_engine_that_is_not_left_holds_nobody_up() -> None:
    site = Site(sequences=1)
    site.slow_to_leave = 1_000_000
    assert await leaving(site, limit=0.0) == 1


async def test_without_a_dispatcher_the_sequences_alone_count() -> None:
    site = Site(leases=5, sequences=1)
    site.away = True
    task = leaving(site, limit=60.0)
    await until_said(site, "sequences 1", 3)
    site.running = 0
    assert await task == 0
