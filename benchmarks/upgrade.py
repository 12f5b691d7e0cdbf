"""What clients notice when a cluster changes under load: every stream is compared with its answer before the load.

    python benchmarks/upgrade.py upgrade --trials 10 --json upgrade.json    # echelon upgrade --restart
    python benchmarks/upgrade.py drain --trials 10                          # echelon drain REPLICA
    python benchmarks/upgrade.py autoscale --trials 3                       # 1 -> 3 -> 1 replicas
    python benchmarks/upgrade.py nodes --trials 10                          # a node joins, is drained, and leaves

The demo model on this machine; streams begin at 0.8 of the rate at which the cluster serves them undisturbed (which is
measured first), by a seed. Commands are run as a user runs them. `nodes` takes several raylets of one box, Serve's
Python proxy, and one replica a node. Exit status 1 if any stream was not exact, or the books do not balance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cluster.environment import free_port, prepare_ray

if "nodes" in sys.argv:  # raylets of one box would share HAProxy's ports
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
prepare_ray()

from cluster_state import ready_rows, unsettled  # noqa: E402
from paced_load import Load  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import AutoscalingSection, ClusterConfig, EngineSection, HttpSection, ModelSection  # noqa: E402

SHARE = 0.8  # of what the cluster serves undisturbed
CROWD = 24  # streams at once
PATIENCE = 300.0  # seconds for one change
SETTLE_SECONDS = 60.0
ECHELON = (sys.executable, "-m", "cluster.cli")
AUTOSCALING = AutoscalingSection(
    min_replicas=1, max_replicas=3, target_wait=0.5, up_after=2.0, down_after=8.0, cooldown=8.0
)

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


async def upgraded(load: Load, address: str) -> Trial:
    """All replicas are replaced."""
    before = ready_ids()

    async def change() -> None:
        await command("upgrade", "demo", "--replicas", str(len(before)), "--address", address, "--restart")
        await until(lambda: len(now := ready_ids()) == len(before) and not now & before, "replicas are new")

    return await timed(load, change())


async def drained(load: Load, address: str) -> Trial:
    """One of the replicas is drained, and another one takes its place."""
    before = ready_ids()
    victim = max(ready_rows(), key=lambda row: row.leases).info.id

    async def change() -> None:
        await command("drain", victim, "--address", address)
        await until(lambda: victim not in (now := ready_ids()) and len(now) == len(before), "there is another one")

    return await timed(load, change())


async def scaled(load: Load, address: str) -> Trial:
    """A crowd comes until there are three replicas, and leaves; then it takes until one is left."""
    began = time.monotonic()
    up = 0.0

    async def change() -> None:
        nonlocal up
        async with load.crowd(CROWD):
            await until(lambda: len(ready_ids()) == AUTOSCALING.max_replicas, "three replicas are up")
        up = round(time.monotonic() - began, 2)
        await until(lambda: len(ready_ids()) == 1, "one replica is left")

    trial = await timed(load, change())
    return {**trial, "up_seconds": up}


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


def run_on_own_ray(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """`part` on a local Ray that is gone afterwards."""
    change = {"upgrade": upgraded, "drain": drained, "autoscale": scaled}[part]
    with_scaling = part == "autoscale"
    config = ClusterConfig(
        model=ModelSection(autoscaling=AUTOSCALING) if with_scaling else ModelSection(replicas=args.replicas),
        engine=EngineSection(max_num_seqs=4) if with_scaling else EngineSection(),
        http=HttpSection(port=free_port()),
    )
    try:
        up = bring_up(config, address=None, progress=lambda text: print(text, flush=True))
        await_running(lambda text: None)
        share = SHARE / 4 if with_scaling else SHARE  # the crowd is added to what one replica bears with ease
        return asyncio.run(measure(part, args, up.base_url, lambda load: change(load, up.ray_address), share))
    finally:
        bring_down(own_ray=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("upgrade", "drain", "autoscale", "nodes"))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no trial begins after so many")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the result to this file")
    args = parser.parse_args()
    if args.part == "nodes":
        from upgrade_nodes import run_on_raylets

        result = run_on_raylets(args)
    else:
        result = run_on_own_ray(args.part, args)
    save(args.json, result)
    sys.exit(bool(result["errors"] or result["books"]))


if __name__ == "__main__":
    main()
