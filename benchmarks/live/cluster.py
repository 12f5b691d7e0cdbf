"""A cluster for one part of a benchmark: the demo model on an own local Ray, gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.environment import free_port, prepare_ray

prepare_ray()

import ray  # noqa: E402

from cluster.app import RunningCluster, await_running, bring_down, bring_up  # noqa: E402
from cluster.config import (  # noqa: E402
    ClusterConfig,
    DispatchSection,
    EngineSection,
    HttpSection,
    ModelSection,
)
from cluster.names import DISPATCHER, NAMESPACE  # noqa: E402
from router.dispatch.lease import ReplicaTable  # noqa: E402
from router.keys.edit import add_key  # noqa: E402
from router.keys.ring import make_key  # noqa: E402

SMALL = EngineSection(max_num_seqs=8, max_num_batched_tokens=256)


@contextlib.contextmanager
def running(
    *,
    qos: Path | None,
    engine: EngineSection = SMALL,
    replicas: int = 1,
    ingresses: int = 1,
    keys: Path | None = None,
    strategy: str = "min_expected_latency",
) -> Iterator[RunningCluster]:
    """All replicas are up in the block."""
    config = ClusterConfig(
        model=ModelSection(path="demo", replicas=replicas),
        engine=engine,
        http=HttpSection(
            port=free_port("127.0.0.1"), ingress_replicas=ingresses, api_keys=None if keys is None else str(keys)
        ),
        dispatch=DispatchSection.model_validate({"qos": None if qos is None else str(qos), "strategy": strategy}),
    )
    try:
        cluster = bring_up(config, address=None, progress=lambda text: print(text, flush=True))
        await_running(lambda text: None)
        yield cluster
    finally:
        bring_down(own_ray=True)


def write_tiers(file: Path, tiers: Mapping[str, Mapping[str, float]], *, enabled: bool = True, **limits: Any) -> Path:
    """A QoS file at `file`: by tier, the highest first, quotas by user; `limits` by tier as in the file. Whole at once:
    a cluster may be reading it.
    """
    lines = {tier: [{"id": u, "quota_pct": q} for u, q in users.items()] for tier, users in tiers.items()}
    whole = {"enable_user_qos": enabled, "user_groups": list(tiers), "user_group_map": lines}
    new = file.with_suffix(".new")
    new.write_text(json.dumps({**whole, "tiers": limits} if limits else whole))
    os.replace(new, file)
    return file


def write_keys(file: Path, owners: Sequence[tuple[str, str]], admins: Sequence[str] = ()) -> dict[str, str]:
    """A key for each (owner, tier); by owner."""
    keys = {owner: make_key() for owner, _ in owners}
    for owner, tier in owners:
        add_key(file, keys[owner], owner, tier=tier, admin=owner in admins)
    return keys


def dispatcher() -> Any:
    """Its actor."""
    return ray.get_actor(DISPATCHER, namespace=NAMESPACE)


def table() -> ReplicaTable:
    """As the dispatcher sees it now."""
    found: ReplicaTable = ray.get(dispatcher().status.remote(), timeout=30)
    return found


async def until(holds: Callable[[ReplicaTable], bool], seconds: float = 120.0) -> ReplicaTable:
    """The first table that `holds`, looked at five times a second. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds(found := await asyncio.to_thread(table)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s; {found.waiting} requests wait")
        await asyncio.sleep(0.2)
    return found
