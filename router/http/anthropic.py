"""What Anthropic's clients do differently on their routes: the key's header, and how an error's body looks."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.protocol.message_events import error_body

PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})


class AnthropicWays:
    """ASGI middleware around the gate. On `PATHS` an `x-api-key` is the bearer where there is no Authorization header
    (several are several), and errors get the body that these clients read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if all(name != b"authorization" for name, _ in headers):
            keys = [(b"authorization", b"Bearer " + value) for name, value in headers if name == b"x-api-key"]
            scope = {**scope, "headers": [*headers, *keys]}
        await self._app(scope, receive, _Errors(send))


class _Errors:
    """`send`, with bodies of errors held until they are whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                body = error_body(bytes(self._body), self._start["status"])
                MutableHeaders(scope=self._start)["content-length"] = str(len(body))
                await self._send(self._start)
                await self._send({"type": "http.response.body", "body": body})
