"""The short way to a client: from a stream's events to the connection of the server, past all that stands between.

ASGI has no such way: every part of a body is a dict that travels through a coroutine a layer. An answer begins and ends
through all of them, they look at nothing else; the parts between take this way, once a stream and step. It is uvicorn's
`send` without its questions, for its httptools protocol; under any other server there is none, and ASGI serves.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_KEY = "echelon.server_send"


def note_server(scope: Scope, send: Send) -> None:
    """`send` is the server's own, unless a layer further out has said so before."""
    if scope["type"] == "http":
        scope.setdefault(_KEY, send)


class Outermost:
    """ASGI middleware for the place next to the server: what is inside finds the server's own `send`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        note_server(scope, send)
        await self._app(scope, receive, send)


def straight_write(scope: Scope) -> Callable[[str], bool] | None:
    """Writes a part of the chunked body that has begun for `scope`; it says whether it did. None where there is no way.

    It does not while the client has too much to take: then `send` waits, and so do those who want to write.
    """
    cycle = getattr(scope.get(_KEY), "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not cycle.chunked_encoding or cycle.response_complete:
        return None
    flow, write = cycle.flow, cycle.transport.write

    def put(events: str) -> bool:
        if flow.write_paused or cycle.disconnected:
            return False
        write(f"{len(events):x}\r\n{events}\r\n".encode("ascii"))
        return True

    return put
