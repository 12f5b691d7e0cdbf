"""Streams that are checked byte by byte, and clients that leave in the middle. For `soak.py` and the tests under load.

The reference of a stream is the whole (not streamed) answer to the same greedy request, asked for before the load.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

HANGS_SECONDS = 120.0  # without a byte


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, streamed or not."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """What every stream of an ask must come to: texts and finish reasons by choice, and the bill."""

    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    usage: dict[str, Any]


def make_asks(seed: int, count: int, model: str = "demo", *, most_tokens: int = 250) -> list[Ask]:
    """Greedy requests of all shapes: chats and completions, short and long, 1 to 3 choices, log-probabilities.

    Long ones have between 40 and `most_tokens` tokens.
    """
    rng = random.Random(seed)
    asks = []
    for i in range(count):
        a, b = rng.randrange(1, 50), rng.randrange(1, 50)
        text = rng.choice(
            [f"What is {a} + {b}?", f"Count from {a} to {a + 9}.", "What is the capital of France?", "Hi!"]
        )
        body: dict[str, Any] = {"model": model, "temperature": 0, "n": rng.choice([1, 1, 1, 2, 3])}
        body["skip_special_tokens"] = False  # log-probabilities show all tokens, so the text must
        if i % 2:
            body |= {"max_tokens": rng.randrange(40, most_tokens), "ignore_eos": True}
        if i % 3 == 2:
            asks.append(Ask("/completions", {**body, "prompt": text, "logprobs": rng.choice([None, 0, 2])}))
        else:
            chat = {"messages": [{"role": "user", "content": text}], "logprobs": rng.random() < 0.3}
            asks.append(Ask("/chat/completions", {**body, **chat}))
    return asks


class Client:
    """Asks the server at `base_url`, one connection a request."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        self._host, self._port, self._prefix = parts.hostname, parts.port or 80, parts.path

    async def whole(self, ask: Ask) -> Expected:
        """The answer, not streamed. Raises RuntimeError for a status other than 200."""
        raw = await self._read(ask.path, ask.body, None)
        assert raw is not None
        answer = json.loads(_body_of(raw))
        choices = answer["choices"]
        texts = tuple(c["text"] if "text" in c else c["message"]["content"] for c in choices)
        return Expected(texts, tuple(c["finish_reason"] for c in choices), answer["usage"])

    async def stream(self, ask: Ask, expected: Expected) -> str:
        """What is wrong with one stream of `ask`; "" when it is exact."""
        body = {**ask.body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            raw = await self._read(ask.path, body, None)
            assert raw is not None
            return wrong_with(_body_of(raw), ask, expected)
        except (RuntimeError, OSError, ValueError, KeyError, TimeoutError, asyncio.IncompleteReadError) as e:
            return f"{type(e).__name__}: {e}"

    async def leave(self, ask: Ask, after_bytes: int, *, abruptly: bool) -> bool:
        """Stream `ask`, go away once so many bytes came; False when the stream ended before."""
        return await self._read(ask.path, {**ask.body, "stream": True}, after_bytes, abruptly=abruptly) is None

    async def _read(
        self, path: str, body: dict[str, Any], leave_after: int | None, *, abruptly: bool = False
    ) -> bytes | None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        data = json.dumps(body).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        )
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(HANGS_SECONDS) as deadline:
                while True:
                    most = 1 << 16 if leave_after is None else min(1 << 16, leave_after - size)
                    if most == 0:
                        return None
                    part = await reader.read(most)
                    if not part:
                        return b"".join(parts)
                    parts.append(part)
                    size += len(part)
                    deadline.reschedule(asyncio.get_running_loop().time() + HANGS_SECONDS)
        finally:
            if abruptly:
                writer.transport.abort()
            writer.close()


def _body_of(raw: bytes) -> bytes:
    """The body of a whole HTTP answer, unchunked. Raises RuntimeError where the answer is not a 200, or not whole."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(raw[:400].decode("latin-1"))
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    parts = []
    while True:
        size, line_end, rest = rest.partition(b"\r\n")
        length = int(size, 16) if line_end else -1
        if length < 0 or rest[length : length + 2] != b"\r\n":
            raise RuntimeError(f"cut off after {len(b''.join(parts))} bytes: {parts[-1:]!r}")
        if length == 0:
            return b"".join(parts)
        parts.append(rest[:length])
        rest = rest[length + 2 :]


def wrong_with(body: bytes, ask: Ask, expected: Expected) -> str:
    """What is not exact in the events of one stream; "" when all is.

    Exact: every choice's text, one finish reason each, one bill, `[DONE]` once and last, and where log-probabilities
    were asked for, as many tokens as were billed, in order: their bytes are the text.
    """
    *lines, last, nothing = body.decode("ascii").split("\n\n")
    if (last, nothing) != ("data: [DONE]", "") or not all(line.startswith("data: {") for line in lines):
        return f"the stream ends with {body[-200:]!r}"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    if len({e["id"] for e in events}) != 1:
        return "the id changes"
    *events, bill = events
    if bill["choices"] or bill["usage"] != expected.usage or any(e["usage"] for e in events):
        return f"usage {bill['usage']} instead of {expected.usage}"
    count = len(expected.texts)
    texts, reasons = [""] * count, [""] * count
    shown: list[list[bytes]] = [[] for _ in range(count)]
    for event in events:
        (choice,) = event["choices"]
        at = choice["index"]
        if reasons[at]:
            return f"choice {at} goes on after its finish"
        texts[at] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        reasons[at] = choice["finish_reason"] or ""
        shown[at] += _token_bytes(choice["logprobs"])
    if tuple(texts) != expected.texts or tuple(reasons) != expected.reasons:
        return f"{texts} {reasons} instead of {expected.texts} {expected.reasons}"
    if ask.body.get("logprobs") not in (None, False):
        tokens = sum(len(s) for s in shown) + reasons.count("stop")  # the token that ends an answer is not shown
        if tokens != expected.usage["completion_tokens"]:
            return f"{tokens} tokens shown, {expected.usage['completion_tokens']} billed"
        joined = [b"".join(s).decode("utf-8", "replace") for s in shown]
        if ask.path.startswith("/chat") and joined != texts:
            return f"the tokens are {joined}, the text is {texts}"
    return ""


def _token_bytes(logprobs: dict[str, Any] | None) -> list[bytes]:
    if not logprobs:
        return []
    if "tokens" in logprobs:  # completions give text, not bytes
        return [t.encode() for t in logprobs["tokens"]]
    return [bytes(t["bytes"]) for t in logprobs["content"]]


async def references(client: Client, asks: Sequence[Ask], at_once: int = 4) -> list[Expected]:
    """The whole answers, a few at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(ask: Ask) -> Expected:
        async with gate:
            return await client.whole(ask)

    return list(await asyncio.gather(*(one(a) for a in asks)))


async def run_streams(
    client: Client,
    asks: Sequence[Ask],
    expected: Sequence[Expected],
    *,
    streams: int,
    seconds: float,
    ended: Callable[[str], None],
) -> None:
    """`streams` at once, one after the other each, for `seconds`; `ended` hears what was wrong with each."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds

    async def run(first: int) -> None:
        at = first
        while loop.time() < until:
            i = at % len(asks)
            ended(await client.stream(asks[i], expected[i]))
            at += streams + 1  # all meet all

    await asyncio.gather(*(run(i) for i in range(streams)))


async def run_leavers(
    client: Client, seed: int, count: int, *, at_once: int, left: Callable[[bool], None], model: str = "demo"
) -> None:
    """`count` clients that go away after a random number of bytes, half of them abruptly; `left` hears who did."""
    rng = random.Random(seed)
    body = {"model": model, "max_tokens": 600, "ignore_eos": True, "temperature": 0}
    plans = [(rng.randrange(1, 60_000), rng.random() < 0.5, rng.choice([1, 1, 2])) for _ in range(count)]
    gate = asyncio.Semaphore(at_once)

    async def one(after: int, abruptly: bool, n: int) -> None:
        messages = [{"role": "user", "content": f"Count from {after % 40} to 50."}]
        async with gate:
            ask = Ask("/chat/completions", {**body, "n": n, "messages": messages})
            left(await client.leave(ask, after, abruptly=abruptly))

    await asyncio.gather(*(one(*p) for p in plans))
