"""G6: two replicas and several numbers of ingresses; and the death of the dispatcher under streams.

The gap is that of useful service by quota, of all replicas, as they report it 20 times a second, over any interval
through which both users wait: at most 2 R (U + X). Shares are taken over windows, from the same reports.

The dispatcher is killed while long streams run and new requests come ten times a second: how long no new request gets
its first token, whether a stream is cut, and whether a replica ever has more leases than it can.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.config import EngineSection
from live.cluster import dispatcher, running, table, until, write_tiers
from live.figures import Figure, apart, median, single
from live.shares import gap_and_shares
from live.site import Site, Stream, beside
from live.steps import StepWatch
from router.dispatch.lease import ReplicaTable
from router.qos.ledger import Prices
from router.qos.steps import step_limits

QUOTAS = {"a": 60.0, "b": 40.0}
TIERS = {"Platinum": {"vip": 100.0}, "Bronze": QUOTAS}
ENGINE = EngineSection(max_num_seqs=4, max_num_batched_tokens=256, num_blocks=512)
REPLICAS = 2
CROWD = 16  # requests of each user, at any time
LEARN_SECONDS = 6.0  # until the first long answers have ended, nobody knows how long they are

PROBE_SECONDS = 0.1
LEASE_SECONDS = 3.0
STREAM_TOKENS = 500


def bound_of_gap(context: int) -> float:
    """2 R (U + X), in units."""
    assert ENGINE.num_blocks is not None
    pool = ENGINE.num_blocks * ENGINE.block_size
    limits = step_limits(Prices(), step_tokens=ENGINE.max_num_batched_tokens, pool_tokens=pool, context=context)
    return 2.0 * REPLICAS * (limits.step + limits.ahead)


async def _backlogged(site: Site, secret: str, seconds: float) -> tuple[float, list[float]]:
    crowd = [site.forever("a", 120, 30) for _ in range(CROWD)] + [site.forever("b", 20, 90) for _ in range(CROWD)]
    async with StepWatch(secret) as watch, beside(crowd):
        await asyncio.sleep(LEARN_SECONDS)
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        return gap_and_shares(watch.service, QUOTAS, began, time.perf_counter())


def _over(rows: ReplicaTable) -> int:
    """Leases beyond what any replica can have: each tier all slots, where lower ones yield them and keep their leases;
    and one that waits in the engine for each account.
    """
    heads = sum(map(len, TIERS.values()))
    return max((r.slots - len(TIERS) * r.info.max_num_seqs - heads for r in rows.rows), default=0)


async def _killed(site: Site) -> tuple[float, float, int, int]:
    """(longest wait for a new first token, longest pause of a stream, streams cut, leases too many)."""
    streams = [asyncio.create_task(site.ask("a", 20, STREAM_TOKENS, usage=True)) for _ in range(2 * REPLICAS)]
    probes: list[asyncio.Task[Stream]] = []
    await asyncio.sleep(2.0)
    too_many = 0

    async def probe() -> None:
        while True:
            probes.append(asyncio.create_task(site.ask("vip", 8, 1)))
            await asyncio.sleep(PROBE_SECONDS)

    async with beside([probe()]):
        await asyncio.sleep(1.0)
        killed = time.perf_counter()
        await asyncio.to_thread(ray.kill, dispatcher(), no_restart=False)
        while time.perf_counter() - killed < 2.0 * LEASE_SECONDS:
            rows = await asyncio.to_thread(table)
            too_many = max(too_many, _over(rows))
            await asyncio.sleep(PROBE_SECONDS)
    firsts = sorted(s.began + s.first for s in await asyncio.gather(*probes) if s.began + s.first >= killed)
    dark = max(b - a for a, b in zip([killed, *firsts], firsts, strict=False))
    ended = await asyncio.gather(*streams, return_exceptions=True)
    whole = [s for s in ended if isinstance(s, Stream) and s.tokens == STREAM_TOKENS]
    pause = max((gap for s in whole for gap in s.gaps), default=float("inf"))
    return dark, pause, len(ended) - len(whole), too_many


async def _deaths(site: Site, trials: int) -> list[Figure]:
    found = []
    for _ in range(trials):
        found.append(await _killed(site))
        await until(lambda seen: not seen.waiting and len(seen.rows) == REPLICAS)
    return [
        median("dispatcher killed: without new first tokens", [f[0] for f in found], "s", LEASE_SECONDS),
        median("dispatcher killed: longest pause of a stream", [f[1] for f in found], "s"),
        single("dispatcher killed: streams cut or short", sum(f[2] for f in found), bound=0),
        single("dispatcher killed: leases beyond capacity", sum(f[3] for f in found), bound=0),
    ]


async def _one(site: Site, secret: str, number: int, seconds: float, trials: int) -> tuple[list[Figure], list[float]]:
    """What is measured with `number` ingresses; and the shares."""
    bound = bound_of_gap((await asyncio.to_thread(table)).rows[0].info.max_model_len)
    gap, shares = await _backlogged(site, secret, seconds)
    figures = [
        single(f"{number} ingresses: gap of service / quota", gap, "units", bound),
        median(f"{number} ingresses: share of 60 %", shares, "%"),
    ]
    return figures + (await _deaths(site, trials) if trials else []), shares


def measure(numbers: Sequence[int], seconds: float, trials: int) -> list[Figure]:
    """A cluster for each number of ingresses; the dispatcher of the last one is killed `trials` times."""
    figures: list[Figure] = []
    shares: dict[int, list[float]] = {}
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            file = write_tiers(Path(folder) / "qos.json", TIERS)
            with running(qos=file, engine=ENGINE, replicas=REPLICAS, ingresses=number) as cluster:
                deaths = trials if number == numbers[-1] else 0
                site = Site(cluster.base_url)
                found, windows = asyncio.run(_one(site, cluster.secret, number, seconds, deaths))
        figures += found
        shares[number] = windows
    one, *more = shares
    return figures + [
        apart(f"{n} ingresses: share of 60 % apart from that with {one}", shares[n], shares[one], "points", 1.0)
        for n in more
    ]
