"""A replica as a Serve deployment: it owns the placement group, and its own process is the supervisor.

The supervisor holds no model. It starts the ranks as its children, tells the dispatcher where they listen, and watches
them: when a rank dies it ends the gang and itself, and Serve starts a new replica with a new id.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.names import DISPATCHER, NAMESPACE
from cluster.placement import rank_bundles, rank_options
from cluster.rank_actor import RankActor
from workers.api.config import ReplicaConfig

ANNOUNCE_SECONDS = 0.5

log = logging.getLogger("ray.serve")  # Serve routes this one to the replica's log file


class Replica:
    """The supervisor of one gang of ranks."""

    async def __init__(self, config: ReplicaConfig, revision: str | None, secret: str, threads: int) -> None:  # type: ignore[misc]
        self._id = serve.get_replica_context().replica_id.unique_id
        self._stopping = False
        group = ray.util.get_current_placement_group()
        remote = ray.remote(RankActor)
        self._ranks: list[ActorHandle[Any]] = [
            remote.options(
                **rank_options(config),
                name=f"rank-{self._id}-{rank}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(config, revision, self._id, rank, secret, threads)
            for rank in range(config.tensor_parallel)
        ]
        meeting = await self._ranks[0].call_meeting.remote() if config.tensor_parallel > 1 else None
        started = await asyncio.gather(*(rank.start.remote(meeting) for rank in self._ranks))
        self._info = started[0].info
        for number, one in enumerate(started):
            phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in one.phases.items())
            log.info("replica %s rank %d (pid %d) is up: %s", self._id, number, one.pid, phases)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._announce())]

    async def _watch(self) -> None:
        """End the gang and this process as soon as one rank has ended."""
        runs = {asyncio.ensure_future(rank.run.remote()): number for number, rank in enumerate(self._ranks)}
        done, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
        if self._stopping:
            return
        for run in done:
            log.error("replica %s: rank %d ended: %s", self._id, runs[run], run.exception() or "it returned")
        self._kill_ranks()
        os._exit(1)

    async def _announce(self) -> None:
        """Tell the dispatcher again and again: one that was restarted knows nobody."""
        dispatcher = None
        while True:
            try:
                dispatcher = dispatcher or ray.get_actor(DISPATCHER, namespace=NAMESPACE)
                await dispatcher.register.remote(self._info)
            except (ValueError, ray.exceptions.RayError) as e:
                log.warning("replica %s cannot reach the dispatcher: %s", self._id, e)
                dispatcher = None
            await asyncio.sleep(ANNOUNCE_SECONDS)

    def _kill_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)

    async def check_health(self) -> None:
        """Serve asks this every second. Raises RuntimeError when the watcher itself died."""
        for task in self._tasks:
            if task.done() and not self._stopping:
                raise RuntimeError(f"replica {self._id}: {task!r} ended")

    async def __del__(self) -> None:
        """Serve stops this replica: no new leases, then the ranks go."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        dispatcher = ray.get_actor(DISPATCHER, namespace=NAMESPACE)
        await dispatcher.unregister.remote(self._id, "stopped by Serve")
        self._kill_ranks()


def replica_application(
    config: ReplicaConfig, *, revision: str | None, replicas: int, secret: str, threads: int
) -> serve.Application:
    """The Serve application of all replicas of one model."""
    deployment = serve.deployment(
        Replica,
        name=config.model.name,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=rank_bundles(config),
        placement_group_strategy="PACK",
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind(config, revision, secret, threads)
