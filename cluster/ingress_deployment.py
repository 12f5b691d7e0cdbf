"""The ingress as a Serve deployment: builds the front of `router.http` around real sessions, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.access import open_keys
from cluster.config import ClusterConfig, resolve_model
from cluster.dispatcher_actor import locate_dispatcher
from cluster.environment import INGRESS_ENV
from cluster.served_model import served_model
from router.dispatch.client import DispatcherClient
from router.dispatch.lease import ReplicaState
from router.engine_link import EngineLinks
from router.http.app import create_app
from router.http.config import FrontConfig
from router.http.identity import NoKeys
from router.http.status import ReplicaRow
from router.keys.resolver import KeyResolver
from router.sessions import Sessions

MAX_ONGOING = 100_000  # Serve must never queue: the dispatcher does, in order


class ClusterStatus:
    """`router.http.status.Status` from the dispatcher's last table."""

    def __init__(self, dispatcher: DispatcherClient) -> None:
        self._dispatcher = dispatcher

    def live(self) -> bool:
        """Whoever can ask is served by this process."""
        return True

    def ready(self) -> bool:
        """Whether a replica takes leases and the dispatcher can grant them."""
        return self._dispatcher.connected and any(r.state is ReplicaState.READY for r in self._dispatcher.rows)

    def healthy(self) -> bool:
        """The same: a replica is READY only while its engine loop reports, and SUSPECT when work stands still."""
        return self.ready()

    def replicas(self) -> Sequence[ReplicaRow]:
        """All replicas known."""
        return [ReplicaRow(r.info.id, r.info.model, r.state.value, r.load) for r in self._dispatcher.rows]


class Ingress:
    """One front. Its user code runs in the server's own loop and never blocks."""

    async def __init__(self, config: ClusterConfig, secret: str) -> None:  # type: ignore[misc]
        logging.getLogger("echelon").setLevel(logging.INFO)
        self._keys = open_keys(config, secret)
        name = f"ingress-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        dispatcher = DispatcherClient(name, secret=secret, locate=locate_dispatcher)
        dispatcher.start()
        self._sessions = Sessions(dispatcher, EngineLinks(name, secret=secret))
        model = served_model(config, resolve_model(config.model.path, config.model.revision))
        self._front = create_app(
            FrontConfig(),
            [model],
            self._sessions,
            ClusterStatus(dispatcher),
            identity=KeyResolver(self._keys) if self._keys else NoKeys(loopback_only=not config.http.no_auth),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once after the constructor."""
        return self._front

    async def __del__(self) -> None:
        """Serve stops this ingress."""
        await self._sessions.close()
        if self._keys is not None:
            self._keys.close()


def front_application(config: ClusterConfig, secret: str) -> serve.Application:
    """The Serve application of the front."""
    deployment: Any = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=config.http.ingress_replicas,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": INGRESS_ENV}},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
    )
    application: serve.Application = deployment.bind(config, secret)
    return application
