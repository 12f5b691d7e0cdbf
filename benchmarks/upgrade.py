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
import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster.environment import free_port, prepare_ray

if "nodes" in sys.argv:  # raylets of one box would share HAProxy's ports
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
prepare_ray()

from cluster_state import ready_rows  # noqa: E402
from live.changes import SHARE, Trial, command, measure, ready_ids, save, timed, until  # noqa: E402
from paced_load import Load  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import AutoscalingSection, ClusterConfig, EngineSection, HttpSection, ModelSection  # noqa: E402

CROWD = 24  # streams at once
AUTOSCALING = AutoscalingSection(
    min_replicas=1, max_replicas=3, target_wait=0.5, up_after=2.0, down_after=8.0, cooldown=8.0
)


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
