"""Clients that stream, one after the other each, and what every one of them saw, with times."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic

from chaos.judge import Fate, Verdict, judge, unchunked
from chaos.oracle import Ask, Oracle

HANGS_SECONDS = 90.0  # without a byte: nobody waits for longer
AGAIN_SECONDS = 0.05  # after a request that was not accepted
TRACES = 20  # tries to have a request explained


@dataclass(eq=False, slots=True)
class Seen:
    """One request as its client saw it. Times are of `monotonic`."""

    ask: Ask
    began: float
    accepted: float | None = None  # when its first byte came
    arrivals: list[float] = field(default_factory=list)  # of every piece of its body
    ended: float | None = None
    verdict: Verdict | None = None
    id: str = ""  # its x-request-id, once it was sent
    front: str = ""  # the ingress that had its last lease, where that was asked for and is known

    @property
    def is_flowing(self) -> bool:
        """Whether tokens have come, and more will."""
        return self.ended is None and len(self.arrivals) > 1

    def longest_pause(self, since: float) -> float:
        """Seconds without a byte: the longest such stretch that ended after `since`, up to its end."""
        times = [self.accepted or self.began, *self.arrivals, self.ended or monotonic()]
        return max((b - a for a, b in pairwise(times) if b > since), default=0.0)


class Client:
    """Asks the server at host:port, one connection a request."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self.host, self.port, self.model = host, port, model
        self._numbers = itertools.count(1)

    async def ask(self, seen: Seen, *, key: str | None = None) -> None:
        """Run `seen.ask` to its end; `seen` has the verdict then. `key`: its Idempotency-Key."""
        raw = bytearray()
        verdict: Verdict | None = None
        seen.id = f"chaos-{next(self._numbers)}"
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(self.request(seen.ask, name=seen.id, key=key))
                await self._read(reader, seen, raw)
            finally:
                writer.close()
        except TimeoutError:
            verdict = Verdict(
                Fate.UNANSWERED if seen.accepted is None else Fate.HUNG, f"{HANGS_SECONDS:g} s of silence"
            )
        except OSError as e:
            verdict = Verdict(Fate.UNANSWERED if seen.accepted is None else Fate.TORN, f"{type(e).__name__}: {e}")
        seen.ended = monotonic()
        seen.verdict = verdict or judge(bytes(raw), seen.ask)

    async def trace(self, seen: Seen) -> None:
        """Ask which ingress `seen` was at. Its `front` stays as it is where nobody knows, or answers."""
        for _ in range(TRACES):
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    lines = f"GET /requests/{seen.id}/explain HTTP/1.1", "host: x", "connection: close", "", ""
                    writer.write("\r\n".join(lines).encode())
                    async with asyncio.timeout(HANGS_SECONDS):
                        raw = await reader.read()
                finally:
                    writer.close()
            except OSError:  # no answer; TimeoutError is one
                raw = b""
            if raw[9:12] in (b"200", b"404"):
                seen.front = front_of(raw)
                return
            await asyncio.sleep(AGAIN_SECONDS)

    def request(self, ask: Ask, *, name: str = "", key: str | None = None) -> bytes:
        """The bytes of the request; `name`: its x-request-id."""
        data = json.dumps(ask.body(self.model)).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", "connection: close"]
        if name:
            lines.append(f"x-request-id: {name}")
        if key is not None:
            lines.append(f"idempotency-key: {key}")
        return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data

    async def _read(self, reader: asyncio.StreamReader, seen: Seen, raw: bytearray) -> None:
        while True:
            async with asyncio.timeout(HANGS_SECONDS):
                part = await reader.read(1 << 16)
            if not part:
                return
            now = monotonic()
            if seen.accepted is None:
                seen.accepted = now
            seen.arrivals.append(now)
            raw += part


def front_of(raw: bytes) -> str:
    """The ingress of the last lease, in the answer `raw` that explains a request; "" where none is known."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if head[9:12] != b"200":
        return ""
    if b"transfer-encoding: chunked" in head.lower():
        body, _ = unchunked(body)
    leases = json.loads(body)["leases"]
    return str(leases[-1]["front"]) if leases else ""


class Load:
    """`streams` clients that ask again and again while the gate is open. `ended` hears of each request."""

    def __init__(
        self, client: Client, oracle: Oracle, *, seed: int, streams: int, tokens: tuple[int, int],
        ended: Callable[[Seen], None],
    ) -> None:  # fmt: skip
        self.client, self._oracle, self._ended = client, oracle, ended
        self._seed, self._streams, self._tokens = seed, streams, tokens
        self._gate = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.live: set[Seen] = set()

    def open(self) -> None:
        """Clients ask."""
        self._gate.set()

    def close(self) -> None:
        """Those that run go on to their end; no new ones."""
        self._gate.clear()

    @property
    def flowing(self) -> list[Seen]:
        """Streams in the middle."""
        return [s for s in self.live if s.is_flowing]

    def start(self) -> None:
        """All clients wait for the gate."""
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self._streams)]

    async def stop(self) -> None:
        """All clients have gone, in the middle or not. Raises what one of them raised."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def one(self, ask: Ask, *, key: str | None = None) -> Seen:
        """One request beside the clients', counted like theirs."""
        seen = Seen(ask, monotonic())
        self.live.add(seen)
        try:
            await self.client.ask(seen, key=key)
        finally:
            self.live.discard(seen)
        self._ended(seen)
        return seen

    async def _client(self, number: int) -> None:
        for ask in self._oracle.asks(f"{self._seed}/{number}", tokens=self._tokens):
            await self._gate.wait()
            seen = await self.one(ask)
            if seen.accepted is None or seen.verdict is None or seen.verdict.fate is Fate.REFUSED:
                await asyncio.sleep(AGAIN_SECONDS)
