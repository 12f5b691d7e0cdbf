"""A cluster that changes under load: a change is timed, its streams are compared, and the books are looked at."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cluster_state import ready_rows, unsettled
from paced_load import Load

SHARE = 0.8  # of what the cluster serves undisturbed
PATIENCE = 300.0  # seconds for one change
SETTLE_SECONDS = 60.0
ECHELON = (sys.executable, "-m", "cluster.cli")

Trial = dict[str, Any]


async def until(holds: Callable[[], bool], what: str) -> None:
    """Return once it holds, looked at three times a second. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
        await asyncio.sleep(0.3)


def ready_ids() -> set[str]:
    """Replicas that take leases."""
    return {r.info.id for r in ready_rows()}


async def command(*words: str) -> None:
    """`echelon WORDS...`. Raises RuntimeError with what it said when it fails."""
    process = await asyncio.create_subprocess_exec(
        *ECHELON, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"echelon {' '.join(words)}: {said.decode()}")


async def timed(load: Load, change: Awaitable[None]) -> Trial:
    """One change under load."""
    began, in_flight = time.monotonic(), load.in_flight
    await change
    return {"change_seconds": round(time.monotonic() - began, 2), "in_flight": in_flight, **load.summary(began)}


async def measure(
    part: str, args: argparse.Namespace, base_url: str, change: Callable[[Load], Awaitable[Trial]], share: float = SHARE
) -> dict[str, Any]:
    """One part, on a cluster that is up."""
    load = await Load.prepared(base_url, args.seed)
    rate = share * await load.capacity()
    print(f"{part}: {rate:.1f} streams a second, {len(load.asks)} shapes", flush=True)
    trials: list[Trial] = []
    async with load.at(rate):
        await asyncio.sleep(3.0)
        last_begin = time.monotonic() + args.seconds
        while len(trials) < args.trials and time.monotonic() < last_begin:
            trials.append(await change(load))
            print(f"  {len(trials)}: {trials[-1]}", flush=True)
            save(args.json, outcome(part, rate, trials, load, "not looked at yet"))
    return report(part, rate, trials, load)


def report(part: str, rate: float, trials: list[Trial], load: Load) -> dict[str, Any]:
    """The table's row, printed; and the books. Raises SystemExit where no change was made."""
    if not trials:
        raise SystemExit(f"{part}: there was no time for a trial")
    deadline = time.monotonic() + SETTLE_SECONDS
    while (open_books := unsettled()) and time.monotonic() < deadline:
        time.sleep(0.3)
    seconds = [t["change_seconds"] for t in trials]
    streams, errors = len(load.outcomes), len(load.faults)
    print(
        f"{part}: n={len(trials)}, each {statistics.median(seconds):.1f} s ({min(seconds):.1f}..{max(seconds):.1f}); "
        f"{errors} errors in {streams} streams (0 would mean < {3 / max(streams, 1):.2%} at 95 %); "
        f"books: {open_books or 'balanced'}"
    )
    for fault in load.faults[:5]:
        print(f"  {fault[:300]}")
    return outcome(part, rate, trials, load, open_books)


def outcome(part: str, rate: float, trials: list[Trial], load: Load, books: str) -> dict[str, Any]:
    """What stands in the file; `books`: what is open in them."""
    return {
        "part": part,
        "rate": round(rate, 2),
        "streams": len(load.outcomes),
        "errors": len(load.faults),
        "faults": load.faults[:5],
        "books": books,
        "trials": trials,
    }


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Put the part into the file beside the others, if there is to be one."""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, result["part"]: result}, indent=1))
