"""Of a connection: whose it is, as the proxy in front says, and whether the body on it has come."""

from __future__ import annotations

from hmac import compare_digest

from starlette.types import Message, Receive, Scope

SECRET_HEADER = b"x-echelon-edge"


def believe_proxy(scope: Scope, secret: bytes) -> None:
    """Put the true "client" and "scheme" into `scope` where the proxy in front shows `secret`; empty = there is none.

    Whoever does not show it is the other end of the connection, whatever its `x-forwarded-for` says. The secret goes
    no further.
    """
    shown = [value for name, value in scope["headers"] if name == SECRET_HEADER]
    if not shown:
        return
    scope["headers"] = [h for h in scope["headers"] if h[0] != SECRET_HEADER]
    if not secret or len(shown) != 1 or not compare_digest(shown[0], secret):
        return
    told = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if address := told.get(b"x-forwarded-for"):
        scope["client"] = (address, 0)
    if scheme := told.get(b"x-forwarded-proto"):
        scope["scheme"] = scheme


class IncomingBody:
    """The body of one request. `complete`: all of it has been received."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = dict(scope["headers"])
        self.complete = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"
        self._receive = receive

    async def receive(self) -> Message:
        """The next message of the connection."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.complete = True
        return message
