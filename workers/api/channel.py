"""Framed asyncio connections: `dial` and `listen`, with the secret, heartbeats and a bound on what is unsent.

A peer that says nothing for some seconds is taken for dead: a cut link gives no EOF. Who dialled judges sooner: it
depends on the other side, and has somewhere else to go. Time in which we did not run ourselves counts for nobody: what
the peer said meanwhile is unread, and a machine that stood still stood still for both. All callbacks run in the event
loop and must not block.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from workers.api.errors import WireError
from workers.api.wire import MAX_FRAME_BYTES, WIRE_VERSION, FrameCodec, FrameSplitter, Hello, Ping

HEARTBEAT_SECONDS = 0.5
GREETING_SECONDS = 3.0  # until one that dialled us has said who it is
SILENCE_SECONDS = 10.0  # of one that dialled us: if it died and not its link, we know at once
DIALLED_SILENCE_SECONDS = 2.0  # of one that we dialled
LOOKS = 2  # at a peer, in the time between two heartbeats
LATE_SECONDS = 0.1  # a look that comes so much later than planned says that we did not run
MAX_UNSENT_BYTES = 64 << 20
MAX_HELLO_BYTES = 4096  # all that a stranger can make us hold

log = logging.getLogger("echelon.channel")


class Handler(Protocol):
    """What an endpoint does with its connections."""

    def opened(self, channel: Channel) -> None:
        """The peer proved that it knows the secret (listening side), or the connection stands (dialling side)."""

    def received(self, channel: Channel, message: Any) -> None:
        """One message."""

    def closed(self, channel: Channel, reason: str) -> None:
        """Once, after `opened`."""


class Channel(asyncio.Protocol):
    """One connection. Made by `dial` and `listen` only."""

    def __init__(self, codec: FrameCodec, handler: Handler, secret: str, hello: Hello | None) -> None:
        self._codec, self._handler, self._secret, self._hello = codec, handler, secret, hello
        self._splitter = FrameSplitter(MAX_HELLO_BYTES) if hello is None else FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._opened = False
        self._reason = ""
        self._looking: asyncio.TimerHandle | None = None
        self._made = self._last_heard = self._last_sent = self._due = 0.0
        self.peer = ""  # name the peer gave in its Hello, then its address

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._opened and self._transport is not None and not self._transport.is_closing()

    def send(self, message: Any) -> None:
        """Queue one message; dropped silently only if the connection is already closed (`closed` tells)."""
        self.send_frame(self._codec.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue an encoded frame; a peer that reads too slowly is cut off."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(frame)
        self._last_sent = self._now()
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close(f"{MAX_UNSENT_BYTES} bytes unsent")

    def close(self, reason: str = "closed here") -> None:
        """End the connection; unsent frames are lost if the peer does not read."""
        self._reason = self._reason or reason
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._loop.call_later(1.0, self._transport.abort)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._loop = asyncio.get_running_loop()
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by inheritance
        self._made = self._last_heard = self._last_sent = self._now()
        self._look_later(self._made)
        if self._hello is not None:
            self.send(self._hello)
            self.peer = ":".join(map(str, transport.get_extra_info("peername")[:2]))
            self._opened = True
            self._handler.opened(self)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._last_heard = self._now()
        try:
            for body in self._splitter.feed(data):
                message = self._codec.decode(body)
                if not self._opened:
                    self._greet(message)
                elif not isinstance(message, Ping):
                    self._handler.received(self, message)
        except WireError as e:
            log.warning("connection of %s refused: %s", self.peer or "unknown peer", e)
            self.close(str(e))

    def _greet(self, message: Any) -> None:
        told = message.secret if isinstance(message, Hello) and isinstance(message.secret, str) else ""
        if not isinstance(message, Hello) or not hmac.compare_digest(told.encode(), self._secret.encode()):
            raise WireError("the first frame must be a Hello with the cluster's secret")
        if message.version != WIRE_VERSION:
            raise WireError(f"peer speaks wire version {message.version}, we speak {WIRE_VERSION}")
        self.peer = str(message.name)
        self._splitter.limit = MAX_FRAME_BYTES
        self._opened = True
        self._handler.opened(self)

    def _look(self) -> None:
        now = self._now()
        late = now - self._due
        if late > LATE_SECONDS:
            self._made += late
            self._last_heard = min(self._last_heard + late, now)
        if not self._opened:
            since, limit = self._made, GREETING_SECONDS
        else:
            since, limit = self._last_heard, SILENCE_SECONDS if self._hello is None else DIALLED_SILENCE_SECONDS
        if now - since > limit:
            self._reason = self._reason or f"silent for {limit} s"
            assert self._transport is not None
            self._transport.abort()
            return
        if now - self._last_sent >= 0.75 * HEARTBEAT_SECONDS and self._opened:
            self.send(Ping())
        self._look_later(now)

    def _look_later(self, now: float) -> None:
        self._due = now + HEARTBEAT_SECONDS / LOOKS
        self._looking = self._loop.call_later(HEARTBEAT_SECONDS / LOOKS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        if self._looking is not None:
            self._looking.cancel()
        if self._opened:
            self._opened = False
            self._handler.closed(self, self._reason or (str(exc) if exc else "closed by the peer"))


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening endpoint."""

    host: str
    port: int
    _server: asyncio.Server

    async def close(self) -> None:
        """Stop listening; open channels stay until closed by their owner."""
        self._server.close()


async def listen(
    host: str, port: int, *, codec: FrameCodec, secret: str, handler: Handler | Callable[[], Handler]
) -> Listener:
    """Listen on host:port (0 = any free one). `handler` may be a factory, called once a connection."""
    loop = asyncio.get_running_loop()

    def make() -> Channel:
        return Channel(codec, handler() if callable(handler) else handler, secret, None)

    server = await loop.create_server(make, host, port)
    return Listener(host, server.sockets[0].getsockname()[1], server)


async def dial(
    host: str, port: int, *, codec: FrameCodec, secret: str, name: str, handler: Handler, timeout: float = 3.0
) -> Channel:
    """Connect and greet. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        _, channel = await loop.create_connection(
            lambda: Channel(codec, handler, secret, Hello(WIRE_VERSION, secret, name)), host, port
        )
    return channel
