"""One HTTP/1.1 exchange with a foreign server, on a connection of its own; every wait has a deadline."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from workers.api.errors import ConfigError, NodeFailed

CONNECT_SECONDS = 3.0
HEAD_SECONDS = 600.0  # a whole answer may take minutes until its first byte
IDLE_SECONDS = 60.0  # between two parts of a body
_READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: to connect, to the head of the answer, between two parts of its body."""

    connect: float = CONNECT_SECONDS
    head: float = HEAD_SECONDS
    idle: float = IDLE_SECONDS


def checked_url(url: str) -> str:
    """`url` as a base to which `/v1/...` is appended. Raises ConfigError."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as e:
        raise ConfigError(f"it is not a URL: {e}") from e
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or not url.isascii():
        raise ConfigError("a node's URL has the form http://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"


class Upstream:
    """An answer that has begun: `status`, `headers` (lower-case names), then its body. Close it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadlines: Deadlines) -> None:
        self._reader, self._writer, self._deadlines = reader, writer, deadlines
        self._http = h11.Connection(h11.CLIENT)
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(
        cls,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        deadlines: Deadlines | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> Upstream:
        """Ask for `url` and wait for the head of the answer; `trust` is for https. Raises NodeFailed."""
        deadlines = deadlines or Deadlines()
        parts = urlsplit(url)
        tls = (trust or ssl.create_default_context()) if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        try:
            async with asyncio.timeout(deadlines.connect):
                reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
        except TimeoutError as e:
            raise NodeFailed(f"no connection within {deadlines.connect:g} s") from e
        except OSError as e:
            raise NodeFailed(f"cannot be reached: {e}") from e
        upstream = cls(reader, writer, deadlines)
        try:
            await upstream._ask(method, parts.path or "/", parts.netloc, headers or {}, body)
        except BaseException:
            await upstream.close()
            raise
        return upstream

    async def _ask(self, method: str, target: str, host: str, headers: Mapping[str, str], body: bytes) -> None:
        fields = [("host", host), ("connection", "close"), ("content-length", str(len(body))), *headers.items()]
        request = h11.Request(method=method, target=target, headers=fields)
        sent = [self._http.send(request), self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())]
        try:
            async with asyncio.timeout(self._deadlines.head):
                self._writer.write(b"".join(part for part in sent if part))
                await self._writer.drain()
                event = await self._next()
                while isinstance(event, h11.InformationalResponse):
                    event = await self._next()
        except TimeoutError as e:
            raise NodeFailed(f"no answer within {self._deadlines.head:g} s") from e
        except OSError as e:
            raise NodeFailed(f"broke off before it answered: {e}") from e
        if not isinstance(event, h11.Response):
            raise NodeFailed("broke off before it answered")
        self.status = event.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes. Raises NodeFailed when it ends too early or stalls."""
        while True:
            try:
                async with asyncio.timeout(self._deadlines.idle):
                    event = await self._next()
            except TimeoutError as e:
                raise NodeFailed(f"sent nothing for {self._deadlines.idle:g} s", answered=True) from e
            except OSError as e:
                raise NodeFailed(f"broke off: {e}", answered=True) from e
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise NodeFailed("broke off in the middle of its answer", answered=True)

    async def whole(self, most: int) -> bytes:
        """All of the body. Raises NodeFailed, also where it has more than `most` bytes."""
        body = bytearray()
        async for part in self.parts():
            body += part
            if len(body) > most:
                raise NodeFailed(f"its answer has more than {most} bytes", answered=True)
        return bytes(body)

    async def close(self) -> None:
        """The connection is closed, whatever was still to come."""
        self._writer.transport.abort()

    async def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event. Raises NodeFailed for what is not HTTP."""
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        except h11.RemoteProtocolError as e:
            raise NodeFailed(f"does not answer in HTTP: {e}", answered=self.status != 0) from e
        return event
