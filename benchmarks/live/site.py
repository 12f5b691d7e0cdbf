"""A client of the cluster that measures: raw connections, one a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Headers = Iterable[tuple[str, str]]
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Stream:
    """One answer: when it was asked for, and when each event came (seconds of `time.perf_counter`); several tokens may
    come with one event. `tokens`: as its usage says, if it was asked for.
    """

    began: float
    tokens: int = 0
    events: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `seconds`: from the connection's start to its last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Refused(Exception):
    """A stream was asked for, and the answer is an error."""


class Site:
    """`units` are counted by user as tokens come. `keys`: API keys by user; without them users are believed."""

    def __init__(self, base_url: str, keys: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._keys = keys
        self.units: Counter[str] = Counter()
        self.rng = random.Random(7)

    def prompt(self, tokens: int) -> list[int]:
        """Ids that no cache has."""
        return [self.rng.randrange(300, 900) for _ in range(tokens)]

    def body(self, user: str, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """A completion of exactly `tokens` tokens."""
        who = {} if self._keys else {"user_id": user}
        fixed = {"model": "demo", "ignore_eos": True, "temperature": 1.0, "seed": self.rng.randrange(10**6)}
        return {**fixed, "prompt": prompt, "max_tokens": tokens, **who, **more}

    def bearer(self, user: str) -> list[tuple[str, str]]:
        """The header that says who asks."""
        return [("authorization", f"Bearer {self._keys[user]}")] if self._keys else []

    async def call(
        self, path: str, body: Any = None, headers: Headers = (), *, user: str = "", method: str = ""
    ) -> Answer:
        """One request and its whole answer, whatever it is; `body` None: a GET."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        sent = [("host", "x"), ("connection", "close"), *(self.bearer(user) if user else []), *headers]
        if body is not None:
            sent += [("content-type", "application/json"), ("content-length", str(len(data)))]
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(_head(f"{method} {path} HTTP/1.1", sent) + data)
            whole = await reader.read()
        finally:
            writer.close()
        seconds = time.perf_counter() - began
        head, _, rest = whole.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if found.get("transfer-encoding") == "chunked":
            rest = _joined(rest)
        return Answer(int(first.split(" ")[1]), found, rest, seconds)

    async def ask(
        self, user: str, prompt: int | list[int], tokens: int, headers: Headers = (), *, usage: bool = False
    ) -> Stream:
        """One streamed completion, to its end. Raises Refused."""
        ids = prompt if isinstance(prompt, list) else self.prompt(prompt)
        more = {"stream_options": {"include_usage": True}} if usage else {}
        data = json.dumps(self.body(user, ids, tokens, stream=True, **more)).encode()
        path = "/v1/completions" if self._keys else "/v1/completions_qos"
        sent = [("host", "x"), ("content-type", "application/json"), ("content-length", str(len(data)))]
        reader, writer = await asyncio.open_connection(self._host, self._port)
        stream = Stream(time.perf_counter())
        try:
            writer.write(_head(f"POST {path} HTTP/1.1", [*sent, *self.bearer(user), *headers]) + data)
            await self._read(reader, stream, user, len(ids))
        finally:
            writer.close()
        return stream

    async def forever(self, user: str, prompt_tokens: int, tokens: int) -> None:
        """Again and again, until cancelled."""
        while True:
            await self.ask(user, prompt_tokens, tokens)

    async def _read(self, reader: asyncio.StreamReader, stream: Stream, user: str, prompt_tokens: int) -> None:
        tail = b""
        while b"data: [DONE]" not in tail or not tail.endswith(b"0\r\n\r\n"):
            got = await reader.read(1 << 16)
            if not got or (not tail and not got.startswith(b"HTTP/1.1 200")):
                raise Refused(f"{user}: {(tail + got)[:300]!r}")
            seen = tail + got
            count = seen.count(b"data: {") - tail.count(b"data: {")
            if count and not stream.events:
                self.units[user] += prompt_tokens
            self.units[user] += 2 * count
            stream.events += [time.perf_counter()] * count
            if said := _COMPLETION_TOKENS.search(seen):
                stream.tokens = int(said[1])
            tail = seen[-256:]


def _head(line: str, headers: Headers) -> bytes:
    return "\r\n".join((line, *(f"{name}: {value}" for name, value in headers), "", "")).encode("latin-1")


def _joined(chunks: bytes) -> bytes:
    whole = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        whole, chunks = whole + chunks[:length], chunks[length + 2 :]
    return whole


@contextlib.asynccontextmanager
async def beside(work: list[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """`work` goes on during the block. Raises what one of it raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
