"""The dispatcher as a Ray actor of its own: a thin shell around `router.dispatch.server`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from cluster.config import LogSection
from cluster.controller_clock import keep_controller_in_time
from cluster.logs import set_up_logs
from cluster.names import DISPATCHER, NAMESPACE
from cluster.qos_file import QosFile
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.lease import ReplicaTable
from router.dispatch.ledger import Ledger
from router.dispatch.server import DispatcherServer, Orders
from router.vitals import Vitals, own_vitals
from workers.api.errors import ConfigError
from workers.api.replica import ReplicaInfo

QOS_SECONDS = 1.0  # between two looks at the QoS file

_log = logging.getLogger("echelon.dispatcher")


class DispatcherActor:
    """Ray restarts it when it dies; replicas announce themselves again, ingresses re-register their leases."""

    def __init__(
        self, config: DispatcherConfig, secret: str, log: LogSection, qos: Mapping[str | None, Path] | None = None
    ) -> None:
        set_up_logs(log.level, log.format)
        self._qos = {model: QosFile(path) for model, path in (qos or {}).items()}
        self._tasks: list[asyncio.Task[None]] = []
        self._server = DispatcherServer(config, secret=secret, host=ray.util.get_node_ip_address())
        self._starting = asyncio.Lock()
        self._address: tuple[str, int] | None = None

    async def address(self) -> tuple[str, int]:
        """Host and port for ingresses; listening starts with the first call."""
        async with self._starting:
            if self._address is None:
                self._address = await self._server.start()
                self._tasks.append(asyncio.create_task(keep_controller_in_time(), name="Serve's clock"))
                if self._qos:
                    self._tasks.append(asyncio.create_task(self._watch(), name="QoS files"))
        return self._address

    async def _watch(self) -> None:
        while True:
            for model, file in self._qos.items():
                try:
                    config = await asyncio.to_thread(file.look)
                    if config is not None:
                        self._server.reload(config, model)
                except Exception:  # a defect here must not end the watch
                    _log.exception("the QoS configuration stays as it was")
            await asyncio.sleep(QOS_SECONDS)

    async def register(self, info: ReplicaInfo) -> Orders:
        """A replica listens at `info`; idempotent. The answer is for its supervisor."""
        await self.address()
        return self._server.register(info)

    async def drain(self, info: ReplicaInfo) -> int:
        """The replica at `info` gets no new leases; how many it still has. A new dispatcher learns of it, too."""
        await self.register(info)
        return self._server.drain(info.id)

    async def retire(self, replica_id: str) -> bool:
        """The replica is drained, and its supervisor told to end it then. False if there is none of this id."""
        return self._server.retire(replica_id)

    async def expect(self, model: str, seconds: float) -> None:
        """A replica of `model` is about to come: for so many seconds requests wait for it."""
        self._server.dispatcher.expect(model, seconds)

    async def unregister(self, replica_id: str, reason: str) -> None:
        """A replica is gone."""
        self._server.unregister(replica_id, reason)

    async def status(self) -> ReplicaTable:
        """The table of replicas."""
        return self._server.status()

    async def ledger(self) -> Ledger:
        """The books of the leases."""
        return self._server.ledger()

    async def clients(self) -> tuple[str, ...]:
        """Names of the ingresses (ingress-PID-...) and gateways that are connected."""
        return self._server.client_names

    async def vitals(self) -> Vitals:
        """What this process holds."""
        return own_vitals()


def start_dispatcher(
    config: DispatcherConfig, secret: str, log: LogSection, qos: Mapping[str | None, Path], *, shared: bool = False
) -> Any:
    """Start the one dispatcher of this Ray cluster; it looks after the files `qos`, each of the model of that name, and
    the one of None of all others.

    Raises ConfigError when one runs there already; `shared`: that one is taken.
    """
    try:
        ray.get_actor(DISPATCHER, namespace=NAMESPACE)
    except ValueError:
        pass
    else:
        if not shared:
            raise ConfigError("an Echelon runs in this Ray cluster already: stop it first (echelon stop --address ...)")
    return (
        ray.remote(DispatcherActor)
        .options(
            name=DISPATCHER,
            namespace=NAMESPACE,
            get_if_exists=shared,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(config, secret, log, qos)
    )


async def find_dispatcher() -> Any:
    """Its actor. Raises ConnectionError while there is none.

    The look-up blocks for as long as Ray's head is away, so it has a thread: the event loop goes on meanwhile.
    """
    try:
        return await asyncio.to_thread(ray.get_actor, DISPATCHER, namespace=NAMESPACE)
    except (ValueError, ray.exceptions.RayError) as e:
        raise ConnectionError(f"the dispatcher's actor cannot be found: {e}") from e


async def locate_dispatcher() -> tuple[str, int]:
    """Its host and port. Raises ConnectionError while there is none."""
    actor = await find_dispatcher()
    try:
        address: tuple[str, int] = await actor.address.remote()
    except ray.exceptions.RayError as e:
        raise ConnectionError(f"the dispatcher's actor does not answer: {e}") from e
    return address
