"""`echelon serve proxy`: dispatcher and front in one process, over API servers that run elsewhere. No Ray.

Nothing stands before its port: whoever opens it to the world puts a proxy with limits of its own in front.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn

from cluster.config import ClusterConfig, checked_config
from cluster.logs import set_up_logs
from cluster.pipeline.server_config import ServerOptions, http_section
from cluster.serving import refuse_open_house, refuse_taken_port
from router.cluster_status import ClusterStatus
from router.dispatch.client import DispatcherClient
from router.dispatch.server import DispatcherServer
from router.engine_link import EngineLinks
from router.http.app import create_app
from router.http.identity import NoKeys
from router.http.straight import Outermost
from router.keys.live import LiveKeys
from router.keys.resolver import KeyResolver
from router.remote_answers import RemoteAnswers
from router.remote_stories import RemoteStories
from router.sessions import Sessions

NAME = "proxy"


def run_proxy(options: ServerOptions, strategy: str, nodes: Sequence[str], say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ConfigError."""
    values = {
        "http": http_section(options),
        "dispatch": {"strategy": strategy, "nodes": [{"url": url} for url in nodes]},
        "log": {"level": options.level},
    }
    config = checked_config(values, "the options")
    who = refuse_open_house(config)
    refuse_taken_port(config.http.host, config.http.port)
    set_up_logs(config.log.level, config.log.format)
    asyncio.run(_serve(config, lambda url: say(f"Echelon dispatches at {url}\n  {who}\n  stop it with Ctrl-C")))


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: they end more than this server."""
        yield


async def _serve(config: ClusterConfig, say: Callable[[str], None]) -> None:
    http, secret = config.http, secrets.token_hex(16)
    dispatcher = DispatcherServer(replace(config.dispatcher_config(), models=()), secret=secret)
    address = await dispatcher.start()

    async def locate() -> tuple[str, int]:
        return address

    client = DispatcherClient(NAME, secret=secret, locate=locate)
    client.start()
    sessions = Sessions(client, EngineLinks(NAME, secret=secret))
    keys = None if http.api_keys is None else LiveKeys(Path(http.api_keys))
    app = create_app(
        config.front_config(""),
        [],
        sessions,
        ClusterStatus(client),
        identity=KeyResolver(keys) if keys else NoKeys(loopback_only=not http.no_auth, origins=http.allow_origins),
        answers=RemoteAnswers(client),
        stories=RemoteStories(client),
        nodes=client,
    )
    server = _Server(
        uvicorn.Config(
            Outermost(app),
            host=http.host,
            port=http.port,
            log_config=None,
            proxy_headers=False,
            ssl_certfile=http.tls_cert,
            ssl_keyfile=http.tls_key,
        )
    )
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    serving = asyncio.create_task(server.serve())
    try:
        while not (server.started or serving.done()):  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.02)
        say(f"{'https' if http.tls_cert else 'http'}://{http.host}:{http.port}/v1")
        await asyncio.wait([serving, asyncio.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.should_exit = True
        await serving
        await sessions.close()
        await dispatcher.close()
        if keys is not None:
            keys.close()
