"""QoS over HTTP on a cluster of its own with the demo model: what a flood costs the tier above (G1), shares of executed
service (G3), and the speed beside first come, first served (G4).

    python benchmarks/qos_live.py [--pairs 8] [--crowd 50] [--json FILE]

Everything in interleaved pairs, as ratios with the median and its 95 % interval (bootstrap): the machine is small and
shared. G1: requests of the upper tier alone, then beside `crowd` endless requests of the lower one. G3: two users with
twenty requests each at any time; units as clients see them (prompt + 2 per token). G4: the same requests of four users
of one tier, once by quotas, once with `enable_user_qos: false`, which the cluster takes over without a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.environment import free_port, prepare_ray

prepare_ray()

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, DispatchSection, EngineSection, HttpSection  # noqa: E402

USERS = {"a": 95.0, "b": 5.0, "c": 50.0, "d": 50.0}
SWITCH_SECONDS = 3.0  # the file is looked at every second, by dispatcher and replicas


def tiers(*, enabled: bool) -> dict[str, Any]:
    lines = [{"id": user, "quota_pct": quota} for user, quota in USERS.items()]
    return {
        "enable_user_qos": enabled,
        "user_groups": ["Platinum", "Silver", "Bronze"],
        "user_group_map": {
            "Platinum": [{"id": "vip", "quota_pct": 100}],
            "Silver": lines,
            "Bronze": [{"id": "crowd", "quota_pct": 100}],
        },
    }


def switch(file: Path, *, enabled: bool) -> None:
    """The cluster goes by quotas, or first come, first served, soon after."""
    file.write_text(json.dumps(tiers(enabled=enabled)))


@dataclass
class Stream:
    """One answer: when it was asked for, and when each event came (seconds of `time.perf_counter`)."""

    began: float
    events: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.events[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]


class Site:
    """Raw connections to the cluster; `units` are counted by user as tokens come."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self.units: Counter[str] = Counter()
        self._rng = random.Random(7)

    async def ask(self, user: str, prompt_tokens: int, tokens: int) -> Stream:
        """One streamed completion, to its end."""
        prompt = [self._rng.randrange(300, 900) for _ in range(prompt_tokens)]
        body = {
            "model": "demo", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True,
            "user_id": user, "temperature": 1.0, "seed": self._rng.randrange(10**6),
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/completions_qos HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}"
        head += "\r\ncontent-type: application/json\r\n\r\n"
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            stream = Stream(time.perf_counter())
            writer.write(head.encode() + data)
            tail = b""
            while b"data: [DONE]" not in tail or not tail.endswith(b"0\r\n\r\n"):
                got = await reader.read(1 << 16)
                if not got or (not tail and not got.startswith(b"HTTP/1.1 200")):
                    raise RuntimeError(f"{user}: {(tail + got)[:300]!r}")
                seen = tail + got
                count = seen.count(b"data: {") - tail.count(b"data: {")
                if count and not stream.events:
                    self.units[user] += prompt_tokens
                self.units[user] += 2 * count
                stream.events += [time.perf_counter()] * count
                tail = seen[-64:]
            return stream
        finally:
            writer.close()

    async def forever(self, user: str, prompt_tokens: int, tokens: int) -> None:
        """Again and again, until cancelled."""
        while True:
            await self.ask(user, prompt_tokens, tokens)


@contextlib.asynccontextmanager
async def beside(work: list[Coroutine[Any, Any, None]]) -> Any:
    """`work` goes on during the block. Raises what one of it raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def interval(values: list[float]) -> tuple[float, float, float]:
    """(median, its 95 % interval) by 2,000 resamples."""
    rng = random.Random(1)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]


async def flood(site: Site, pairs: int, crowd: int) -> dict[str, list[float]]:
    """G1: by pair the ratios of TTFT and of the gap between tokens, loaded to alone, and the seconds of both."""
    out: dict[str, list[float]] = {k: [] for k in ("ttft_ratio", "itl_ratio", "ttft_alone", "ttft_flood", "itl_flood")}

    async def vip() -> tuple[float, float]:
        streams = [await site.ask("vip", 60, 24) for _ in range(4)]
        return statistics.median(s.first for s in streams), statistics.median(g for s in streams for g in s.gaps)

    await vip()
    for _ in range(pairs):
        alone = await vip()
        async with beside([site.forever("crowd", 100 + 10 * (i % 20), 30 + 20 * (i % 10)) for i in range(crowd)]):
            await asyncio.sleep(3.0)
            loaded = await vip()
        await asyncio.sleep(0.5)
        out["ttft_ratio"].append(loaded[0] / alone[0])
        out["itl_ratio"].append(loaded[1] / alone[1])
        out["ttft_alone"].append(alone[0])
        out["ttft_flood"].append(loaded[0])
        out["itl_flood"].append(loaded[1])
    return out


async def shares(site: Site, first: str, second: str, seconds: float) -> float:
    """G3: the share of `first`, of the two."""
    work = [site.forever(first, 60, 40) for _ in range(20)] + [site.forever(second, 10, 60) for _ in range(20)]
    async with beside(work):
        await asyncio.sleep(3.0)
        before = site.units.copy()
        await asyncio.sleep(seconds)
        gained = {u: site.units[u] - before[u] for u in (first, second)}
    await asyncio.sleep(1.0)
    return gained[first] / sum(gained.values())


async def speed(site: Site, file: Path, pairs: int) -> list[float]:
    """G4: by pair the speed by quotas relative to that of first come, first served."""

    async def makespan() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(site.ask("abcd"[i % 4], 20 + 10 * (i % 9), 16 + 8 * (i % 6)) for i in range(48)))
        return time.perf_counter() - began

    found = []
    for number in range(pairs):
        took: dict[bool, float] = {}
        for enabled in (True, False) if number % 2 else (False, True):
            switch(file, enabled=enabled)
            await asyncio.sleep(SWITCH_SECONDS)
            took[enabled] = await makespan()
        found.append(took[False] / took[True])
    switch(file, enabled=True)
    await asyncio.sleep(SWITCH_SECONDS)
    return found


async def measure(site: Site, file: Path, parts: str, pairs: int, crowd: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if "G1" in parts:
        figures["G1"] = await flood(site, pairs, crowd)
    if "G4" in parts:
        figures["G4"] = {"speed_ratio": await speed(site, file, pairs)}
    if "G3" in parts:
        figures["G3"] = {
            "share_95": [await shares(site, "a", "b", 20.0) for _ in range(3)],
            "share_50": [await shares(site, "c", "d", 12.0) for _ in range(2)],
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="G1,G3,G4")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--crowd", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qos.json"
        switch(file, enabled=True)
        config = ClusterConfig(
            engine=EngineSection(max_num_seqs=8, max_num_batched_tokens=256),
            http=HttpSection(port=free_port("127.0.0.1")),
            dispatch=DispatchSection(qos=str(file)),
        )
        try:
            running = bring_up(config, address=None, progress=lambda text: print(text, flush=True))
            await_running(lambda text: None)
            figures = asyncio.run(measure(Site(running.base_url), file, given.parts, given.pairs, given.crowd))
        finally:
            bring_down(own_ray=True)
    for name, rows in figures.items():
        for what, values in rows.items():
            median, low, high = interval(values)
            ends = f"{min(values):.3f}..{max(values):.3f}, n={len(values)}"
            print(f"{name} {what}: median {median:.3f} [{low:.3f}, {high:.3f}], {ends}")
    if given.json:
        given.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
