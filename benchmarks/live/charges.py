"""G8: what users are charged and what ran for nobody is what was executed, by the metrics of a live run.

Two replicas, tiers that preempt each other over a small cache, prompts that begin alike, clients that leave half-way,
and a rank that is killed. `qos_tokens_total` has the books of the policy, as the dispatcher added them up;
`echelon_executed_tokens_total` what each engine counted for itself, step by step. Of the replica that was killed the
last report counts. Answers that were not cancelled are also counted as their clients see them: prompt less cached, and
output less the last token, which is drawn and never run.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from cluster.config import EngineSection
from live.cluster import running, table, until, write_tiers
from live.figures import Figure, single
from live.site import Site, beside
from live.steps import StepWatch

TIERS = {"Platinum": {"vip": 100.0}, "Bronze": {"a": 70.0, "b": 30.0}}
ENGINE = EngineSection(max_num_seqs=6, max_num_batched_tokens=256, num_blocks=160)  # full before its slots are
QUIET_SECONDS = 2.0  # after the last answer, until all has been reported


class Books:
    """What clients saw of the answers that they took to the end."""

    def __init__(self) -> None:
        self.useful = self.cached = self.answers = self.cancelled = 0

    def answered(self, usage: dict[str, int], cached: int) -> None:
        """One answer of one choice."""
        self.answers += 1
        self.cached += cached
        self.useful += usage["prompt_tokens"] - cached + usage["completion_tokens"] - 1


async def _work(site: Site, books: Books, user: str, common: list[int], end: float, *, cancels: bool) -> None:
    path = "/v1/completions_qos"
    while time.perf_counter() < end:
        prompt = common + site.prompt(site.rng.randrange(10, 120))
        body = site.body(user, prompt, site.rng.randrange(20, 160))
        patience = site.rng.uniform(0.2, 2.0) if cancels and site.rng.random() < 0.5 else None
        try:
            async with asyncio.timeout(patience):
                answer = await site.call(path, body)
        except TimeoutError:
            books.cancelled += 1
            continue
        if answer.status != 200:
            raise RuntimeError(f"{user}: {answer.status} {answer.body[:200]!r}")
        usage = answer.json()["usage"]
        books.answered(usage, (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        await asyncio.sleep(1.0 if user == "vip" else 0.0)  # it comes and goes, and preempts each time


async def _busy(site: Site, books: Books, seconds: float, *, cancels: bool) -> None:
    commons = {user: site.prompt(64) for user in ("a", "b", "vip")}
    end = time.perf_counter() + seconds
    users = [*(["a"] * 8), *(["b"] * 8), *(["vip"] * 3)]
    await asyncio.gather(*(_work(site, books, u, commons[u], end, cancels=cancels) for u in users))
    await until(lambda seen: not any(r.load.requests.running for r in seen.rows))
    await asyncio.sleep(QUIET_SECONDS)


async def _kill_one(delay: float) -> None:
    await asyncio.sleep(delay)
    rows = (await asyncio.to_thread(table)).rows
    os.kill(max(rows, key=lambda row: row.leases).info.pid, signal.SIGKILL)


async def _booked(site: Site) -> Counter[str]:
    """`qos_tokens_total` by kind."""
    page = (await site.call("/metrics")).body.decode()
    found: Counter[str] = Counter()
    for kind, value in re.findall(r'^qos_tokens_total\{.*kind="(\w+)".*\} (\S+)$', page, re.M):
        found[kind] += int(float(value))
    return found


async def _engines(site: Site, watch: StepWatch) -> int:
    """Tokens executed by all engines: those that stand by the metrics, those that are gone as last heard."""
    page = (await site.call("/metrics")).body.decode()
    lines = re.findall(r'^echelon_executed_tokens_total\{.*engine="([^"]+)".*\} (\S+)$', page, re.M)
    standing = {engine: int(float(value)) for engine, value in lines}
    return sum({**{i: load.executed_tokens for i, load in watch.last.items()}, **standing}.values())


async def _measured(site: Site, secret: str, seconds: float) -> list[Figure]:
    books, figures = Books(), []
    async with StepWatch(secret) as watch:
        before = await _booked(site)
        await _busy(site, books, seconds, cancels=False)
        booked = await _booked(site) - before
        users = booked["prefill"] + booked["decode"]
        figures.append(single("no cancels: answers", books.answers))
        figures.append(single("no cancels: cached tokens", books.cached))
        off = abs(users - books.useful) / users
        figures.append(single(f"no cancels: users' {users} against clients' {books.useful}, off by", off, "", 0.001))
        async with beside([_kill_one(seconds / 2)]):
            await _busy(site, books, seconds, cancels=True)
        booked = await _booked(site)
        users, executed = booked["prefill"] + booked["decode"], await _engines(site, watch)
        off = abs(users + booked["overhead"] - executed) / executed
        name = f"users {users} + overhead {booked['overhead']} against executed {executed}, off by"
        preemptions = sum(load.preemptions for load in watch.last.values())
        figures += [
            single("all: answers", books.answers),
            single("all: cancelled by their clients", books.cancelled),
            single("all: preemptions", preemptions),
            single("all: replicas that were there", len(watch.last)),
            single(name, off, "", 0.001),
        ]
    return figures


def measure(seconds: float) -> list[Figure]:
    """`seconds` without cancels, and again with them and with the death of a rank."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_tiers(Path(folder) / "qos.json", TIERS)
        with running(qos=file, engine=ENGINE, replicas=2) as cluster:
            return asyncio.run(_measured(Site(cluster.base_url), cluster.secret, seconds))
