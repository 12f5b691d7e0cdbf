"""A client that only counts: raw connections, streams of events, no parsing. For the benchmarks of this folder.

It looks for `data: ` and for the end of the chunked body, and keeps three numbers a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"
DONE = b"data: [DONE]"


def post(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of one request."""
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


@dataclass(slots=True)
class Counted:
    """One stream: events, bytes, and when things came (seconds of `time.perf_counter`)."""

    events: int = 0
    bytes: int = 0
    began: float = 0.0
    first_text: float = 0.0
    ended: float = 0.0


class _Counter(asyncio.Protocol):
    """Plays `requests` one after the other on one connection."""

    def __init__(self, requests: Sequence[bytes], text_event: int) -> None:
        self._text_event = text_event
        self.done: asyncio.Future[list[Counted]] = asyncio.get_running_loop().create_future()
        self._requests, self._streams = list(requests), [Counted()]
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def start(self) -> None:
        self._streams[-1].began = time.perf_counter()
        assert self._transport is not None
        self._transport.write(self._requests[len(self._streams) - 1])

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            raise RuntimeError(f"bytes after the end of the last answer: {data[:80]!r}")
        stream = self._streams[-1]
        if not stream.bytes and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(data[:300].decode("latin-1")))
            return
        stream.bytes += len(data)
        seen = self._tail + data
        stream.events += seen.count(b"data: ") - self._tail.count(b"data: ")
        if stream.events >= self._text_event and not stream.first_text:
            stream.first_text = time.perf_counter()
        self._tail = seen[-64:]
        if seen.endswith(END) and DONE in seen:
            stream.ended = time.perf_counter()
            self._tail = b""
            if len(self._streams) == len(self._requests):
                self.done.set_result(self._streams)
            else:
                self._streams.append(Counted())
                self.start()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed: {exc}"))


@dataclass(slots=True)
class Round:
    """What one round of load gave."""

    streams: list[Counted] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the last byte

    @property
    def events(self) -> int:
        """Of all streams, `[DONE]` not counted."""
        return sum(s.events - 1 for s in self.streams)

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


async def play(host: str, port: int, connections: Sequence[Sequence[bytes]], *, text_event: int = 2) -> Round:
    """All connections at once; each plays its requests one after the other. Raises RuntimeError for an answer not 200.

    `text_event` is the number of the first event with text: 2 in a chat, where the first one is the role.
    """
    loop = asyncio.get_running_loop()
    counters = []
    for requests in connections:
        _, counter = await loop.create_connection(lambda r=requests: _Counter(r, text_event), host, port)  # type: ignore[misc]
        counters.append(counter)
    began = time.perf_counter()
    for counter in counters:
        counter.start()
    streams = [s for played in await asyncio.gather(*(c.done for c in counters)) for s in played]
    seconds = time.perf_counter() - began
    for counter in counters:
        assert counter._transport is not None
        counter._transport.close()
    return Round(streams, seconds)
