"""The dispatcher as a Ray actor of its own: a thin shell around `router.dispatch.server`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray

from cluster.config import DispatchSection
from cluster.names import DISPATCHER, NAMESPACE
from router.dispatch.server import DispatcherServer
from workers.api.replica import ReplicaInfo


class DispatcherActor:
    """Ray restarts it when it dies; replicas announce themselves again, ingresses re-register their leases."""

    def __init__(self, config: DispatchSection, secret: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._server = DispatcherServer(secret=secret, strategy=config.strategy, max_waiting=config.max_waiting)
        self._lock = asyncio.Lock()
        self._address: tuple[str, int] | None = None

    async def address(self) -> tuple[str, int]:
        """Host and port for ingresses; listening starts with the first call."""
        async with self._lock:
            if self._address is None:
                self._address = await self._server.start(ray.util.get_node_ip_address(), 0)
        return self._address

    async def register(self, info: ReplicaInfo) -> None:
        """A replica listens at `info`; idempotent."""
        await self.address()
        self._server.register(info)

    async def unregister(self, replica_id: str) -> None:
        """A replica takes no more leases."""
        self._server.unregister(replica_id)


def start_dispatcher(config: DispatchSection, secret: str) -> Any:
    """The one dispatcher of this Ray cluster: made, or found."""
    return (
        ray.remote(DispatcherActor)
        .options(
            name=DISPATCHER,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(config, secret)
    )
