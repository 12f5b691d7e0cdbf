"""The web pages on a port of their own: before a server that runs, or before a cluster that is started for them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from cluster.serving import cluster_config, is_loopback, run_until_stopped
from router.foreign.upstream import Deadlines, Upstream, checked_url
from router.web.server import page_server
from workers.api.errors import ConfigError, NodeFailed

ASK_SECONDS = 10.0
UNAUTHORIZED = 401
_POLL_SECONDS = 0.02
_OPEN_HOUSE = (
    "the API server asks for no key, so whoever reaches {name} could use it, as an operator too: let it ask for keys "
    "(--api-keys), or say --no-auth"
)


def show_before_server(url: str, *, name: str, port: int, no_auth: bool, say: Callable[[str], None]) -> None:
    """Show the pages of the API server at `url` until Ctrl-C or SIGTERM. Raises ConfigError."""
    base = _base(url)
    if not (no_auth or is_loopback(name)) and asyncio.run(_asks_for_no_key(base)):
        raise ConfigError(_OPEN_HOUSE.format(name=name))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _listener(name, port) as listener, _shown(base, listener) as where:
        say(f"The web pages of {base} are at {where}/chat and {where}/operator; Ctrl-C ends them")
        stop.wait()


def show_with_cluster(
    model: str, flags: dict[str, Any], *, address: str | None, name: str, port: int, no_auth: bool
) -> None:
    """Serve `model` as `run_until_stopped` does, with the pages beside it. Raises EchelonError."""
    if not (no_auth or is_loopback(name)) and cluster_config(model, flags).http.api_keys is None:
        raise ConfigError(_OPEN_HOUSE.format(name=name))
    with _listener(name, port) as listener:

        @contextlib.contextmanager
        def beside(url: str, trust: ssl.SSLContext | None) -> Iterator[str]:
            with _shown(_base(url), listener, trust) as where:
                yield f"web pages: {where}/chat and {where}/operator"

        run_until_stopped(model, flags, address=address, beside=beside)


def _base(url: str) -> str:
    try:
        return checked_url(url)
    except ConfigError as e:
        raise ConfigError(f"{url!r} is not of the form http://host:port") from e


async def _asks_for_no_key(base: str) -> bool:
    """Whether the server there answers without a key, as far as it answers: one that is away may come up so."""
    try:
        deadlines = Deadlines(head=ASK_SECONDS, idle=ASK_SECONDS)
        answer = await Upstream.open("GET", f"{base}/v1/models", deadlines=deadlines)
    except NodeFailed:
        return True
    await answer.close()
    return answer.status != UNAUTHORIZED


def _listener(name: str, port: int) -> socket.socket:
    """Bound before anything else is begun. Raises ConfigError."""
    try:
        return socket.create_server((name, port), family=socket.AF_INET6 if ":" in name else socket.AF_INET)
    except OSError as e:
        why = f"the web pages cannot listen on {name}:{port} ({e.strerror or e})"
        raise ConfigError(f"{why}: take another --server-name or --server-port") from e


@contextlib.contextmanager
def _shown(base: str, listener: socket.socket, trust: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL at which the pages are served meanwhile, from a thread of its own."""
    config = uvicorn.Config(
        page_server(base, trust), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web pages", daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(_POLL_SECONDS)
        host, port = listener.getsockname()[:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
