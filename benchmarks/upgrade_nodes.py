"""The part `nodes` of `upgrade.py`: raylets of one box, one replica a node; one joins, is drained, and leaves."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import ray
from cluster_state import ready_rows
from live.changes import Trial, command, measure, ready_ids, timed, until
from paced_load import Load
from ray.cluster_utils import Cluster

from cluster.app import await_running, bring_down, bring_up
from cluster.config import ClusterConfig, HttpSection, ModelSection
from cluster.environment import free_port

STORE_BYTES = 80 << 20
NODES = 2  # with one replica each, besides the head


def add_node(raylets: Cluster) -> Any:
    """A node with room for one replica."""
    return raylets.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE_BYTES)


async def changed(load: Load, raylets: Cluster, address: str) -> Trial:
    """A node joins; the one whose replica is busiest is drained to it, and leaves."""
    before = ready_ids()
    row = max(ready_rows(), key=lambda r: r.leases)
    leaver = next(n for n in raylets.worker_nodes if n.node_id == row.info.node)
    began = time.monotonic()
    drained = 0.0

    async def change() -> None:
        nonlocal drained
        add_node(raylets)  # it sets signal handlers: not in another thread
        await command("drain", leaver.node_id, "--address", address)
        drained = round(time.monotonic() - began, 2)
        await asyncio.to_thread(raylets.remove_node, leaver, False)
        await until(lambda: row.info.id not in (now := ready_ids()) and len(now) == len(before), "it has moved")

    trial = await timed(load, change())
    return {**trial, "drained_seconds": drained}


def run_on_raylets(args: argparse.Namespace) -> dict[str, Any]:
    """On a Ray of several raylets that is gone afterwards."""
    raylets = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "num_gpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        config = ClusterConfig(
            model=ModelSection(replicas=NODES, device="cpu"), http=HttpSection(port=free_port(), no_auth=True)
        )
        for _ in range(NODES):
            add_node(raylets)
        up = bring_up(config, address=raylets.address, progress=lambda text: print(text, flush=True), every_node=False)
        await_running(lambda text: None)
        return asyncio.run(measure("nodes", args, up.base_url, lambda load: changed(load, raylets, up.ray_address)))
    finally:
        bring_down(own_ray=False)
        ray.shutdown()
        raylets.shutdown()
