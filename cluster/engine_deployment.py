"""A replica as a Serve deployment: it owns the placement group, and its own process is the supervisor.

The supervisor holds no model. It starts the ranks as its children, tells the dispatcher where they listen, and watches
them: when a rank dies, or the dispatcher has given the replica up, it ends the gang and itself, and Serve starts a new
replica with a new id. A replica that Serve or an operator takes out is drained first (`cluster/draining.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from cluster.autoscaling import serve_autoscaling, stats_of
from cluster.dispatcher_actor import find_dispatcher
from cluster.draining import MARGIN_SECONDS, leave
from cluster.environment import SCALED_ENV
from cluster.gang import Gang
from cluster.placement import ONE_NODE, rank_bundles
from cluster.start_turn import start_turn, turns_at_once
from cluster.step_qos import StepQos
from router.dispatch.scaling import FleetLoad, ScalingConfig
from router.dispatch.server import Orders
from workers.api.config import ReplicaConfig

ANNOUNCE_SECONDS = 0.5
FAILED_STARTS = 2  # of the first replicas: then the deployment has failed; later ones are tried for ever

log = logging.getLogger("ray.serve")  # Serve routes this one to the replica's log file


@dataclass(frozen=True, slots=True)
class Rollout:
    """How replicas come and go. `version`: those of another one are replaced; None: of any earlier deployment."""

    drain_seconds: float = 30.0
    start_first: bool = False  # a new one is up before an old one goes; it needs room for one more
    scaling: ScalingConfig | None = None
    version: str | None = None

    def surge_percent(self, replicas: int) -> int:
        """Serve's word for one replica more than there should be."""
        most = replicas if self.scaling is None else self.scaling.max_replicas
        return max(100 // most, 1) if self.start_first else 0


class Replica:
    """The supervisor of one gang of ranks."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ReplicaConfig,
        revision: str | None,
        secret: str,
        threads: int,
        drain_seconds: float,
        qos: StepQos | None = None,
    ) -> None:
        self._id = serve.get_replica_context().replica_id.unique_id
        self._drain_seconds = drain_seconds
        self._load = FleetLoad()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._gang: Gang | None = None
        async with start_turn(turns_at_once(config.tensor_parallel)):
            gang = self._gang = Gang(
                config,
                ray.util.get_current_placement_group(),
                revision=revision,
                replica_id=self._id,
                secret=secret,
                threads=threads,
                qos=qos,
            )
            self._info = await gang.start()
        self._tasks = [asyncio.create_task(self._watch(gang)), asyncio.create_task(self._announce(gang))]

    async def _watch(self, gang: Gang) -> None:
        """End the gang and this process as soon as one rank has ended."""
        reasons = await gang.run()
        if self._stopping:
            return
        self._end(gang, reasons)

    def _end(self, gang: Gang, reasons: str) -> None:
        log.error("replica %s ends: %s", self._id, reasons)
        gang.kill()
        os._exit(1)

    async def _announce(self, gang: Gang) -> None:
        """Tell the dispatcher again and again: one that was restarted knows nobody. Its answer may be the end of us."""
        dispatcher = None
        while True:
            try:
                dispatcher = dispatcher or await find_dispatcher()
                orders: Orders = await dispatcher.register.remote(self._info)
                self._load = orders.load
                if orders.replace is not None and not self._stopping:
                    self._end(gang, orders.replace)
                if orders.retire:
                    await self._leave(gang, "drained by an operator")
                    os._exit(0)
            except (ConnectionError, ray.exceptions.RayError) as e:
                log.warning("replica %s cannot reach the dispatcher: %s", self._id, e)
                dispatcher = None
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def check_health(self) -> None:
        """Serve asks this every second. Raises RuntimeError when the watcher itself died."""
        for task in self._tasks:
            if task.done() and not self._stopping:
                raise RuntimeError(f"replica {self._id}: {task!r} ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this now and then where the model is autoscaled, and hands it to `cluster.autoscaling`."""
        return stats_of(self._load)

    async def _leave(self, gang: Gang, reason: str) -> None:
        """No new leases; what runs may end, up to the limit; the rest goes on elsewhere. Then the ranks go."""
        self._stopping = True
        try:
            await leave(self._info, gang, find=find_dispatcher, limit=self._drain_seconds, reason=reason)
        finally:
            gang.kill()

    async def __del__(self) -> None:
        """Serve stops this replica."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._gang is not None and self._tasks:  # else it never came up
            await self._leave(self._gang, "stopped by Serve")
        elif self._gang is not None:
            self._gang.kill()


def replica_application(
    config: ReplicaConfig,
    *,
    revision: str | None,
    replicas: int,
    secret: str,
    threads: int,
    qos: StepQos | None = None,
    rollout: Rollout | None = None,
    strategy: str = ONE_NODE,
) -> serve.Application:
    """The Serve application of all replicas of one model; `qos` orders their steps, `strategy` is Ray's
    for a gang.

    Deployed again under another version it replaces the replicas, one after the other.
    """
    rollout = rollout or Rollout()
    scaling = rollout.scaling
    deployment: Any = serve.deployment(
        Replica,
        name=config.model.name,
        num_replicas=replicas if scaling is None else None,
        autoscaling_config=None if scaling is None else serve_autoscaling(scaling, replicas),
        # An environment of its own takes a process of its own: a prestarted one is quicker.
        ray_actor_options={"num_cpus": 0} | ({"runtime_env": {"env_vars": SCALED_ENV}} if scaling else {}),
        placement_group_bundles=rank_bundles(config),
        placement_group_strategy=strategy,
        max_ongoing_requests=1000,
        max_constructor_retry_count=FAILED_STARTS,
        max_surge_percent=rollout.surge_percent(replicas),
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=rollout.drain_seconds + MARGIN_SECONDS,
    )
    if rollout.version is not None:  # Serve draws one for each deployment, and would replace replicas for nothing
        deployment = deployment.options(version=rollout.version, _internal=True)
    application: serve.Application = deployment.bind(config, revision, secret, threads, rollout.drain_seconds, qos)
    return application
