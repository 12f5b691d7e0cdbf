"""A small server for the pages: it shows them, and hands their calls on to the API server at a URL.

So a browser sees one origin, and needs no CORS. Only what the pages ask for is handed on, and only for pages of this
server: other sites' are refused, since a server without keys believes whoever reaches it from its own machine.
"""

from __future__ import annotations

import asyncio
import logging
import ssl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.foreign.upstream import Deadlines, Upstream
from router.http.config import FrontConfig
from router.http.entry import read_body
from router.http.gate import error_response
from router.http.outlet import Outlet, until_gone
from router.protocol.errors import HttpRefusal
from router.web.assets import asset_routes, read_assets
from workers.api.errors import EchelonError, NodeFailed

ROUTES = ("/v1/", "/requests/")  # and all below them
EXACT_ROUTES = ("/me", "/cluster", "/health")
ASKED = ("accept", "authorization", "content-type", "idempotency-key", "x-request-id")
ANSWERED = (
    *("cache-control", "content-type", "retry-after", "www-authenticate", "x-request-id"),
    *("x-queue-position", "x-queue-wait-seconds"),
)
DEADLINES = Deadlines(head=3600.0, idle=600.0)  # a request may wait in a queue for long
PATIENCE_SECONDS = 60.0  # for a browser that takes nothing

log = logging.getLogger("echelon.web")


def page_server(url: str, trust: ssl.SSLContext | None = None) -> Starlette:
    """The application before the API server at `url` (without `/v1`); `trust` is for an https one."""
    config = FrontConfig()

    async def root(request: Request) -> Response:
        return RedirectResponse("/chat")

    async def hand_on(request: Request) -> Response:
        try:
            _check(request)
            return _HandedOn(request, url, await read_body(request, config), trust)
        except EchelonError as e:
            return error_response(e)

    routes = [Route("/", root), *asset_routes(read_assets()), Route("/{path:path}", hand_on, methods=["GET", "POST"])]
    return Starlette(routes=routes)


def _check(request: Request) -> None:
    path = request.url.path
    if not (path.startswith(ROUTES) or path in EXACT_ROUTES) or ".." in path.split("/"):
        raise HttpRefusal(404, "This is the server of the web pages: it does not hand that on.", code="unknown_url")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HttpRefusal(403, "Pages of other sites may not use this server.", code="other_site")


class _HandedOn(Response):
    """The API server's answer, part by part as it comes; a browser that goes away ends it there, too."""

    def __init__(self, request: Request, url: str, body: bytes, trust: ssl.SSLContext | None) -> None:
        self.background = None
        path = request.scope.get("raw_path", request.url.path.encode()).partition(b"?")[0].decode("ascii")
        headers = {name: request.headers[name] for name in ASKED if name in request.headers}
        self._method, self._url, self._asked = request.method, url + path, headers
        self._body, self._trust = body, trust

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and its answer back."""

        def cut() -> None:
            work.cancel()

        outlet = Outlet(send, PATIENCE_SECONDS, cut)
        work = asyncio.create_task(self._run(scope, receive, outlet))
        await until_gone(work, outlet, receive)
        if not work.cancelled():
            work.result()

    async def _run(self, scope: Scope, receive: Receive, send: Outlet) -> None:
        try:
            upstream = await Upstream.open(
                self._method, self._url, headers=self._asked, body=self._body, deadlines=DEADLINES, trust=self._trust
            )
        except NodeFailed as e:
            log.info("the API server at %s %s", self._url, e)
            refusal = HttpRefusal(502, f"The API server {e}.", code="server_away", headers={"retry-after": "1"})
            await error_response(refusal)(scope, receive, send)
            return
        try:
            headers = [(n.encode(), upstream.headers[n].encode("latin-1")) for n in ANSWERED if n in upstream.headers]
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": upstream.status, "headers": headers})
            async for part in upstream.parts():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except NodeFailed as e:  # its end is missing then, and so the page sees that the answer broke off
            log.info("the API server at %s %s", self._url, e)
        finally:
            await upstream.close()
