"""G10: refusals while 10,000 requests wait, and whether the waits that are foretold come true.

The queue is filled by requests of 125 prompts each, every one of which wants a lease of its own: ten users, a thousand
leases each, so that each user is at its limit. Refusals are then measured one by one over connections of their own.

Foretold waits: arrivals are Poisson, of four users of the lowest tier and one above, at 1.5 times of what is served, so
that the queue stays at its users' limits: stationary. Each request that waits is asked for (`GET /requests/ID`) once,
and what it says is held against what it then waits for its lease, and for its first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from load.records import percentile

from live.cluster import running, table, until, write_tiers
from live.figures import Figure, interval, single
from live.foretold import Foretold
from live.site import Answer, Refused, Site

USERS = tuple(f"u{n}" for n in range(10))
QUEUED = 10_000
PROMPTS = 125  # of a request; 128 is the most
TIERS = {"Platinum": {"vip": 100.0}, "Bronze": dict.fromkeys(USERS, 10.0)}
TOP_UP = 5  # tries of each user
REJECTS = 200
PATIENCE = 0.5  # seconds, until a try that was not refused is taken to wait

ROOM = 8  # requests of a user that may wait
ASKERS = USERS[:4]
LOAD = 1.4
SETTLE_SECONDS = 15.0  # from the first arrival, until the queue stands


@contextlib.asynccontextmanager
async def _full_queue(site: Site) -> AsyncIterator[set[asyncio.Task[Answer]]]:
    """QUEUED leases wait in the block, and each user is at its limit; what waits for them is cancelled at its end."""

    async def fill(user: str) -> Answer:
        return await site.call("/v1/completions_qos", site.body(user, [site.prompt(4)] * PROMPTS, 400))

    tasks = {asyncio.create_task(fill(u)) for u in USERS for _ in range(QUEUED // PROMPTS // len(USERS))}
    try:
        await until(lambda seen: seen.waiting >= 0.98 * QUEUED)
        await refusals(site, TOP_UP * len(USERS), len(USERS), tasks)  # those that run wait no more
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def refusals(site: Site, number: int, at_once: int, waiting: set[asyncio.Task[Answer]]) -> list[Answer]:
    """`number` tries of users at their limits, `at_once` under way at any time. Where one of a user's requests has
    ended meanwhile, the try waits in its place, and goes to `waiting`.
    """
    left = iter(range(number))
    found: list[Answer] = []

    async def one_by_one() -> None:
        for turn in left:
            user = USERS[turn % len(USERS)]
            call = site.call("/v1/completions_qos", site.body(user, site.prompt(4), 400))
            done, queued = await asyncio.wait([asyncio.create_task(call)], timeout=PATIENCE)
            waiting.update(queued)
            found.extend(task.result() for task in done)

    await asyncio.gather(*(one_by_one() for _ in range(at_once)))
    return found


def _of_refusals(name: str, answers: list[Answer], most: float | None) -> list[Figure]:
    refused = [a for a in answers if a.status == 429]
    told = [a for a in refused if {"retry-after", "x-queue-position", "x-queue-wait-seconds"} <= a.headers.keys()]
    milliseconds = [1e3 * a.seconds for a in refused]
    p99 = interval(milliseconds, lambda values: percentile(values, 99))
    return [
        single(f"{name}: refused of {REJECTS}", len(refused)),
        single(f"{name}: of them with Retry-After, position and wait", len(told), bound=len(refused), most=False),
        single(f"{name}: p50", statistics.median(milliseconds), "ms"),
        Figure(f"{name}: p99", *p99, "ms", most, values=tuple(milliseconds)),
    ]


async def _flooded(site: Site) -> list[Figure]:
    async with _full_queue(site) as waiting:
        leases = (await asyncio.to_thread(table)).waiting
        figures = [single("leases that wait", leases, bound=0.98 * QUEUED, most=False)]
        for at_once, most in ((1, 50.0), (8, None)):  # eight at once ask as fast as the front can answer
            await refusals(site, 20, at_once, waiting)  # all that runs once has run
            found = await refusals(site, REJECTS, at_once, waiting)
            figures += _of_refusals(f"refusal, {at_once} at once", found, most)
        above = await site.ask("vip", 4, 1)
        figures.append(single("first token of the tier above meanwhile", 1e3 * above.first, "ms"))
    return figures


async def _asked(site: Site, user: str, number: int, found: list[Foretold]) -> None:
    """One request, and what it is told while it waits."""
    name = f"wait-{user}-{number}"
    asked = asyncio.create_task(site.ask(user, 16, 48, [("x-request-id", name)]))
    try:
        await asyncio.sleep(0.05)
        told = (await site.call(f"/requests/{name}")).json()
        at = time.perf_counter()
        stream = await asked
    except Refused:
        return
    finally:
        asked.cancel()
    if "wait_seconds" not in told:
        return
    story = (await site.call(f"/requests/{name}/explain")).json()
    asked_after = at - stream.began
    lease = story["leases"][0]["granted"]["after_seconds"] - asked_after
    found.append(Foretold(*told["wait_seconds"], lease, stream.first - asked_after))


async def _rate(site: Site) -> float:
    """Requests a second when as many are under way as run at once, and some wait."""
    count, began = 60, time.perf_counter()
    slots = asyncio.Semaphore(12)

    async def one(number: int) -> None:
        async with slots:
            await site.ask(ASKERS[number % len(ASKERS)], 16, 48)

    await asyncio.gather(*(one(n) for n in range(count)))
    return count / (time.perf_counter() - began)


async def _foretold(site: Site, seconds: float) -> list[Foretold]:
    rate = LOAD * await _rate(site)
    found: list[Foretold] = []
    pending: set[asyncio.Task[None]] = set()
    began, number, at = time.perf_counter(), 0, 0.0
    while at < SETTLE_SECONDS + seconds:
        user = "vip" if number % 20 == 19 else ASKERS[site.rng.randrange(len(ASKERS))]
        kept = found if at >= SETTLE_SECONDS else []
        pending.add(task := asyncio.create_task(_asked(site, user, number, kept)))
        task.add_done_callback(pending.discard)
        number += 1
        at += site.rng.expovariate(rate)
        await asyncio.sleep(max(began + at - time.perf_counter(), 0.0))
    await asyncio.gather(*pending)
    print(f"G10 {number} arrivals at {rate:.1f} a second, {len(found)} waited and were told how long", flush=True)
    return found


def _of_waits(found: list[Foretold]) -> list[Figure]:
    def share(hits: list[bool]) -> tuple[float, float, float]:
        return interval([float(hit) for hit in hits], statistics.fmean)

    leases = [f.lease for f in found]
    return [
        single("waits for a lease: median", statistics.median(leases), "s"),
        Figure("the interval held, to the lease", *share([f.covers(f.lease) for f in found]), "", 0.8, most=False),
        Figure("the middle was close, to the lease", *share([f.close(f.lease) for f in found]), "", 0.6, most=False),
        Figure("the interval held, to the first token", *share([f.covers(f.first) for f in found])),
        Figure("the middle was close, to the first token", *share([f.close(f.first) for f in found])),
        single("middle over wait: median", statistics.median(f.middle / f.lease for f in found if f.lease > 0.05)),
        single("width of the interval: median", statistics.median(f.high - f.low for f in found), "s"),
    ]


def measure(seconds: float) -> list[Figure]:
    """`seconds`: for how long waits are foretold. That comes first: a flood teaches what is not stationary."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_tiers(Path(folder) / "qos.json", TIERS, Bronze={"max_queued_per_user": ROOM})
        with running(qos=file) as cluster:
            site = Site(cluster.base_url)

            async def both() -> list[Figure]:
                figures = _of_waits(await _foretold(site, seconds))
                await until(lambda seen: not seen.waiting)
                write_tiers(file, TIERS)
                await asyncio.sleep(2.0)  # the file is looked at every second
                return figures + await _flooded(site)

            return asyncio.run(both())
