"""The outermost layer: a request id on every answer, an identity for every route but health, a body for every error.

What may pass is decided by `scope["path"]` as it came, before any routing: no header, no root path and no other
spelling of a route gets by, since all but a few exact paths need an identity.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http.edge import IncomingBody, believe_proxy
from router.http.identity import IdentityResolver
from router.protocol.errors import HttpRefusal, answer_for, code_of, echo
from router.request_context import enter
from workers.api.errors import EchelonError

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
MOST_HEADER_BYTES = 32 << 10  # names and values together; HAProxy in front has less room
MOST_HEADERS = 128
MOST_URL_BYTES = 8 << 10
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

log = logging.getLogger("echelon.http")


def error_response(error: BaseException) -> Response:
    """The HTTP answer to `error`."""
    answer = answer_for(error)
    return Response(answer.body, answer.status, answer.headers, "application/json")


def _check_head(scope: Scope) -> None:
    url = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    if url > MOST_URL_BYTES:
        raise HttpRefusal(414, f"The URL is too long: at most {MOST_URL_BYTES} bytes are read.", code="url_too_long")
    headers = scope["headers"]
    if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > MOST_HEADER_BYTES:
        raise HttpRefusal(
            431, f"The headers are too large: at most {MOST_HEADERS} of together {MOST_HEADER_BYTES} bytes are read."
        )


class Gate:
    """ASGI middleware. Puts "request_id" and "identity" into the scope's state.

    A client's own `x-request-id` is kept when it is 1 to 128 characters of letters, digits and `._:/+=@-`.
    `edge_secret` is what the proxy in front shows, to be believed whose request it hands on. `count` is called with the
    code of every refusal made here. `open_paths` need no identity.
    """

    def __init__(
        self,
        app: ASGIApp,
        resolver: IdentityResolver,
        edge_secret: str = "",
        count: Callable[[str], None] = lambda code: None,
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._resolver = resolver
        self._edge_secret = edge_secret.encode()
        self._count = count
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no WebSockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        believe_proxy(scope, self._edge_secret)
        body = IncomingBody(scope, receive)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _SANE_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        enter(request_id)
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                if not body.complete:  # nobody would wait for the rest of it, within no deadline
                    answer["connection"] = "close"
            await send(message)

        try:
            _check_head(scope)
            if scope["path"] not in self._open_paths:
                client = scope.get("client")
                state["identity"] = self._resolver.resolve(headers, client[0] if client else None)
            await self._app(scope, body.receive, send_named)
        except EchelonError as e:
            if started:
                raise
            self._count(code_of(e))
            await error_response(e)(scope, receive, send_named)
        except ClientDisconnect:
            log.debug("request %s: the client left while it sent", request_id)
        except Exception as e:
            log.exception("request %s: %s %s failed", request_id, echo(scope["method"]), echo(scope["path"]))
            if started:
                raise
            await error_response(e)(scope, receive, send_named)
