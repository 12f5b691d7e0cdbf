"""G3: shares of service under backlog. G4: the speed by quotas beside first come, first served."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from live.cluster import running, write_tiers
from live.figures import Figure, median
from live.site import Site, beside

TIERS = {"Silver": {"a": 95.0, "b": 5.0, "c": 50.0, "d": 50.0}}
WINDOW = 60.0  # seconds, of a share
SWITCH_SECONDS = 3.0  # the file is looked at every second, by dispatcher and replicas


async def share(site: Site, first: str, second: str, seconds: float) -> float:
    """Of `first`, of the units of both as clients see them (prompt + 2 per token); each has twenty requests at any
    time.
    """
    work = [site.forever(first, 60, 40) for _ in range(20)] + [site.forever(second, 10, 60) for _ in range(20)]
    async with beside(work):
        await asyncio.sleep(3.0)
        before = site.units.copy()
        await asyncio.sleep(seconds)
        gained = {u: site.units[u] - before[u] for u in (first, second)}
    await asyncio.sleep(1.0)
    return gained[first] / sum(gained.values())


async def speeds(site: Site, file: Path, pairs: int) -> list[float]:
    """By pair the speed by quotas relative to that of first come, first served, for the same requests."""

    async def makespan() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(site.ask("abcd"[i % 4], 20 + 10 * (i % 9), 16 + 8 * (i % 6)) for i in range(48)))
        return time.perf_counter() - began

    found = []
    for number in range(pairs):
        took: dict[bool, float] = {}
        for enabled in (True, False) if number % 2 else (False, True):
            write_tiers(file, TIERS, enabled=enabled)
            await asyncio.sleep(SWITCH_SECONDS)
            took[enabled] = await makespan()
        found.append(took[False] / took[True])
    return found


def _on_a_cluster(work: Callable[[Site, Path], Awaitable[list[Figure]]]) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        file = write_tiers(Path(folder) / "qos.json", TIERS)

        async def run(site: Site) -> list[Figure]:
            return await work(site, file)

        with running(qos=file) as cluster:
            return asyncio.run(run(Site(cluster.base_url)))


def measure_shares() -> list[Figure]:
    """G3."""

    async def work(site: Site, file: Path) -> list[Figure]:
        unlike = [100 * await share(site, "a", "b", WINDOW) for _ in range(2)]
        alike = [100 * await share(site, "c", "d", WINDOW) for _ in range(2)]
        return [
            median("share of 95 %", unlike, "%"),
            median("share of 50 %", alike, "%"),
            median("a share off by", [abs(s - 95.0) for s in unlike] + [abs(s - 50.0) for s in alike], "points", 1.0),
        ]

    return _on_a_cluster(work)


def measure_speed(pairs: int) -> list[Figure]:
    """G4."""

    async def work(site: Site, file: Path) -> list[Figure]:
        return [median("speed, of first come, first served", await speeds(site, file, pairs), "", 0.97, most=False)]

    return _on_a_cluster(work)
