"""A small OpenAI-compatible server of somebody else: it answers, refuses, hangs or breaks off as it is told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field


@dataclass
class OpenAIServer:
    """Use as an async context. `mode` may change at any time."""

    models: list[str] = field(default_factory=lambda: ["theirs"])
    mode: str = "ok"  # ok, hang, refuse_connection, status, cut_before, cut_within, half_json, no_done
    status: int = 500
    error: bytes = b'{"error": {"message": "their own words", "type": "server_error"}}'
    pieces: int = 4
    needs_key: str = ""
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    probes: int = 0
    url: str = ""
    _server: asyncio.Server | None = None
    _busy: set[asyncio.Task] = field(default_factory=set)

    async def __aenter__(self):
        await self.open()
        return self

    async def __aexit__(self, *exc):
        await self.shut()

    async def open(self, port=0):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def shut(self):
        self._server.close()
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._busy.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has left
        finally:
            self._busy.discard(task)
            writer.close()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.mode == "hang":
            await asyncio.sleep(3600)
        if self.needs_key and headers.get("authorization") != f"Bearer {self.needs_key}":
            await send(writer, 401, b'{"error": {"message": "their key"}}')
        elif method == "GET":
            self.probes += 1
            await send(writer, 200, json.dumps({"data": [{"id": m} for m in self.models]}).encode())
        else:
            self.seen.append((path, headers, body))
            await self._generate(writer, json.loads(body))

    async def _generate(self, writer, asked):
        usage = {"prompt_tokens": 11, "completion_tokens": self.pieces, "prompt_tokens_details": {"cached_tokens": 3}}
        if self.mode == "status":
            await send(writer, self.status, self.error, extra="retry-after: 7\r\n")
        elif self.mode == "cut_before":
            pass
        elif not asked.get("stream"):
            answer = {"choices": [{"message": {"content": "x" * self.pieces}, "finish_reason": "stop"}], "usage": usage}
            text = json.dumps(answer).encode()
            await send(writer, 200, text[:20] if self.mode == "half_json" else text, length=len(text))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for i in range(self.pieces):
                await chunk(writer, event({"choices": [{"delta": {"content": f"t{i}"}}]}))
                if self.mode == "cut_within" and i == 1:
                    return
            if self.mode != "no_done":
                if (asked.get("stream_options") or {}).get("include_usage"):
                    await chunk(writer, event({"choices": [], "usage": usage}))
                await chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()


async def eventually(condition, seconds=20.0):
    """Wait for `condition()`; the time is a safety net."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions here have no event
            await asyncio.sleep(0.005)


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def chunk(writer, data):
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def send(writer, status, body, *, length=None, extra=""):
    head = (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}content-length: {length or len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
