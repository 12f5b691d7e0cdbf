"""A replica as a Serve deployment: it owns the placement group, and its own process is the supervisor.

The supervisor holds no model. It starts the ranks as its children, tells the dispatcher where they listen, and watches
them: when a rank dies, or the dispatcher has given the replica up, it ends the gang and itself, and Serve starts a new
replica with a new id.
"""

from __future__ import annotations

import asyncio
import logging
import os

import ray
from ray import serve

from cluster.dispatcher_actor import find_dispatcher
from cluster.gang import Gang
from cluster.placement import rank_bundles
from cluster.start_turn import start_turn, turns_at_once
from cluster.step_qos import StepQos
from workers.api.config import ReplicaConfig

ANNOUNCE_SECONDS = 0.5
FAREWELL_SECONDS = 2.0
FAILED_STARTS = 2  # of the first replicas: then the deployment has failed; later ones are tried for ever

log = logging.getLogger("ray.serve")  # Serve routes this one to the replica's log file


class Replica:
    """The supervisor of one gang of ranks."""

    async def __init__(  # type: ignore[misc]
        self, config: ReplicaConfig, revision: str | None, secret: str, threads: int, qos: StepQos | None = None
    ) -> None:
        self._id = serve.get_replica_context().replica_id.unique_id
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
                hopeless = await dispatcher.register.remote(self._info)
                if hopeless is not None and not self._stopping:
                    self._end(gang, hopeless)
            except (ConnectionError, ray.exceptions.RayError) as e:
                log.warning("replica %s cannot reach the dispatcher: %s", self._id, e)
                dispatcher = None
            await asyncio.sleep(ANNOUNCE_SECONDS)

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
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                dispatcher = await find_dispatcher()
                await dispatcher.unregister.remote(self._id, "stopped by Serve")
        except (ConnectionError, TimeoutError, ray.exceptions.RayError) as e:
            log.warning("replica %s leaves without a word to the dispatcher: %s", self._id, e)
        finally:
            if self._gang is not None:
                self._gang.kill()


def replica_application(
    config: ReplicaConfig,
    *,
    revision: str | None,
    replicas: int,
    secret: str,
    threads: int,
    qos: StepQos | None = None,
) -> serve.Application:
    """The Serve application of all replicas of one model; `qos` orders their steps."""
    deployment = serve.deployment(
        Replica,
        name=config.model.name,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=rank_bundles(config),
        placement_group_strategy="PACK",
        max_ongoing_requests=1000,
        max_constructor_retry_count=FAILED_STARTS,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind(config, revision, secret, threads, qos)
