"""The ingress as a Serve deployment: builds the front of `router.http` around real sessions, and nothing else."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.middleware import Middleware

from cluster.access import edge_secret, open_keys
from cluster.config import ClusterConfig
from cluster.dispatcher_actor import locate_dispatcher
from cluster.environment import INGRESS_ENV
from cluster.logs import set_up_logs
from cluster.rank_places import RankPlaces
from cluster.served_model import served_models
from router.cluster_status import ClusterStatus
from router.dispatch.client import DispatcherClient
from router.engine_link import EngineLinks
from router.engine_metrics import EngineMetrics
from router.http.app import create_app
from router.http.identity import NoKeys
from router.http.straight import Outermost
from router.keys.resolver import KeyResolver
from router.metrics import Metrics
from router.metrics_page import FrontMetrics
from router.remote_answers import RemoteAnswers
from router.remote_histories import RemoteHistories
from router.remote_stories import RemoteStories
from router.sessions import Sessions

FRONT_VERSION = "front"  # always the same: an upgrade of the replicas cuts nobody's connection
LEAST_SHUTDOWN_SECONDS = 5.0
MAX_ONGOING = 100_000  # Serve must never queue: the dispatcher does, in order


class Ingress:
    """One front. Its user code runs in the server's own loop and never blocks."""

    async def __init__(self, config: ClusterConfig, secret: str, edge: str) -> None:  # type: ignore[misc]
        set_up_logs(config.log.level, config.log.format)
        self._keys = open_keys(config, secret)
        name = f"ingress-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        dispatcher = DispatcherClient(name, secret=secret, locate=locate_dispatcher)
        dispatcher.start()
        self._sessions = Sessions(dispatcher, EngineLinks(name, secret=secret))
        status, metrics = ClusterStatus(dispatcher, models=config.names), Metrics()
        self._metrics = FrontMetrics(dispatcher, metrics, EngineMetrics(status))
        self._metrics.start()
        http = config.http
        self._front = create_app(
            config.front_config(edge),
            served_models(config),
            self._sessions,
            status,
            metrics=metrics,
            page=self._metrics.page,
            answers=RemoteAnswers(dispatcher),
            stories=RemoteStories(dispatcher),
            histories=RemoteHistories(dispatcher, ttl=http.session_ttl, max_sessions=http.max_sessions),
            nodes=dispatcher,
            places=RankPlaces(),
            identity=KeyResolver(self._keys)
            if self._keys
            else NoKeys(loopback_only=not http.no_auth, origins=http.allow_origins),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once after the constructor."""
        return self._front

    async def __del__(self) -> None:
        """Serve stops this ingress."""
        await self._metrics.close()
        await self._sessions.close()
        if self._keys is not None:
            self._keys.close()


def server_layers() -> list[Middleware]:
    """Serve puts these around what it puts around the ingress; named in INGRESS_ENV."""
    return [Middleware(Outermost)]


def front_application(config: ClusterConfig, secret: str, edge: str = "") -> serve.Application:
    """The Serve application of the front; `edge`: what the proxy before it shows; empty: what follows from `secret`."""
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
        graceful_shutdown_timeout_s=max(LEAST_SHUTDOWN_SECONDS, *(one.model.drain_timeout for one in config.each)),
    ).options(version=FRONT_VERSION, _internal=True)
    application: serve.Application = deployment.bind(config, secret, edge or edge_secret(secret))
    return application
