"""The front alone: events a second of `create_app` over a fake engine against bare uvicorn that sends the same bytes.

    python benchmarks/front.py [--streams 64] [--tokens 1024] [--rounds 8]

One server process has all applications, one client process counts events (it parses nothing; its own ceiling is
printed); each has a core of its own. The applications take turns, round by round, and every figure is a ratio to the
bare one of its round. Two ways to produce: `step` makes one token for all streams at a time, as an engine does, in
every application; `burst` makes each stream's tokens without a pause, so that streams run one after the other, and the
front joins what it gets in a turn of the loop, at most 64 events, in one write, as it does where it lags behind its
engines. `wall` is the ratio of events a second, `cpu` that of the server's CPU time for an event.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from stream_client import END, Round, play, post

from router.generation import Batch, ChoiceDelta, GenerationRequest, Sink
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.text.tokenizer import Tokenizer
from workers.api.request import Delta, FinishReason

MODEL = Path(__file__).resolve().parent.parent / "configs" / "demo-model"
TEXT = "The capital of France is Paris, and 3 + 4 is 7. One, two, three; then a pause.\n"
PER_CONNECTION = 2  # requests, one after the other
CORES = sorted(os.sched_getaffinity(0))
AT_ONCE = 64  # tokens of a stream in a turn of the loop, in `burst`


@dataclass
class Steps:
    """An engine's loop: a token for each of its streams, then the next step. It waits for nothing in between."""

    streams: list[tuple[Iterator[Batch], Sink, asyncio.Future[None]]] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    async def run(self, batches: list[Batch], sink: Sink) -> None:
        """Return when all `batches` are with `sink`, one a step."""
        over = asyncio.get_running_loop().create_future()
        self.streams.append((iter(batches), sink, over))
        self._begin()
        await over

    async def step(self) -> None:
        """Return in the next step."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        self._begin()
        await future

    def _begin(self) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self._steps())

    async def _steps(self) -> None:
        while self.streams or self.waiting:
            waiting, self.waiting = self.waiting, []
            for future in waiting:
                future.set_result(None)
            for stream in list(self.streams):
                batches, sink, over = stream
                batch = next(batches, None)
                if batch is None or not sink(batch):
                    self.streams.remove(stream)
                    over.set_result(None)
            await asyncio.sleep(0)
        self.task = None


class FakeEngine:
    """A `Generator` of one token a step; `steps` None = each stream's tokens without a pause."""

    def __init__(self, script: list[int], tokens: int, steps: Steps | None) -> None:
        self._steps = steps
        ends = [None] * (tokens - 1) + [FinishReason.LENGTH]
        deltas = [
            Delta("", i, (t,), finish=end)
            for i, (t, end) in enumerate(zip(itertools.cycle(script), ends, strict=False))
        ]
        self._batches: list[Batch] = [
            (ChoiceDelta(0, delta),) for delta in deltas
        ]  # making them is no part of the front

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        """See `router.generation.Generator`."""
        sink(())
        if self._steps is not None:
            await self._steps.run(self._batches, sink)
            return
        for i, batch in enumerate(self._batches):
            sink(batch)
            if i % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)


class Idle:
    """A status without replicas."""

    def live(self) -> bool:
        return True

    ready = healthy = live

    def replicas(self) -> list[Any]:
        return []


def front(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return create_app(FrontConfig(), [ServedModel("demo", tokenizer, 1 << 16)], engine, Idle())


async def bodies_of(app: Any, body: bytes, tokens: int) -> list[bytes]:
    """The body messages with which `app` answers `body`, as it sends them."""
    sent: list[bytes] = []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http",
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    assert len(sent) > tokens, "events were joined: bare would send fewer chunks"
    return sent


def bare(chunks: list[bytes], steps: Steps | None) -> Any:
    """The least ASGI application that sends `chunks`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            if steps is not None:
                await steps.step()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def fastapi_bare(chunks: list[bytes], steps: Steps | None) -> Any:
    """What a FastAPI tutorial would do."""
    app = FastAPI()

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if steps is not None:
                await steps.step()
            yield chunk

    @app.post("/v1/chat/completions")
    async def answer() -> StreamingResponse:
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def serve(pipe: Connection, tokens: int) -> None:
    """The server process: /NAME/v1/... goes to application NAME. Tells its port, then its CPU seconds when asked."""
    tokenizer = Tokenizer.from_folder(MODEL)
    script = tokenizer.encode(TEXT)
    request = post("/v1/chat/completions", body_of(tokens)).partition(b"\r\n\r\n")[2]

    async def main() -> None:
        chunks = await bodies_of(front(FakeEngine(script, tokens, Steps()), tokenizer), request, tokens)
        apps: dict[str, Any] = {}
        for way in ("step", "burst"):
            for name, make in (("bare", bare), ("fastapi", fastapi_bare)):
                apps[f"{name}-{way}"] = make(chunks, Steps() if way == "step" else None)
            apps[f"front-{way}"] = front(FakeEngine(script, tokens, Steps() if way == "step" else None), tokenizer)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                _, name, path = scope["path"].split("/", 2)
                scope["path"] = "/" + path
                await apps[name](scope, receive, send)

        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        pipe.send(listener.getsockname()[1])
        while (await asyncio.to_thread(pipe.recv)) == "cpu":
            pipe.send(time.process_time())
        server.should_exit = True
        await task

    uvloop.run(main())


def blast(pipe: Connection, wire: bytes) -> None:
    """A server that sends prepared bytes from one buffer: what the client can take at most."""

    class Blast(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(wire)

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Blast, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        server.close()

    uvloop.run(main())


def body_of(tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    return {"model": "demo", "messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}


def started(target: Callable[..., None], *args: Any) -> tuple[Any, Connection, int]:
    """A running server process on a core of its own, the pipe to it, its port."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    os.sched_setaffinity(process.pid, {CORES[0]})
    return process, ours, ours.recv()


async def ceiling(args: argparse.Namespace) -> float:
    """Events a second that the client counts when the bytes cost nothing to make."""
    tokenizer = Tokenizer.from_folder(MODEL)
    request = post("/v1/chat/completions", body_of(args.tokens)).partition(b"\r\n\r\n")[2]
    engine = FakeEngine(tokenizer.encode(TEXT), args.tokens, Steps())
    chunks = await bodies_of(front(engine, tokenizer), request, args.tokens)
    wire = b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks if c) + END
    process, pipe, port = started(blast, wire)
    rates = [(await play("127.0.0.1", port, connections("", args))).rate for _ in range(3)]
    pipe.send("end")
    process.join()
    return statistics.median(rates)


def connections(name: str, args: argparse.Namespace) -> list[list[bytes]]:
    return [[post(f"/{name}/v1/chat/completions", body_of(args.tokens))] * PER_CONNECTION] * args.streams


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, n={len(values)})"


async def main(args: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {CORES[-1]})
    print(f"the client alone counts {await ceiling(args):,.0f} events/s")
    process, pipe, port = started(serve, args.tokens)

    async def measured(name: str) -> tuple[Round, float]:
        pipe.send("cpu")
        before = pipe.recv()
        played = await play("127.0.0.1", port, connections(name, args))
        pipe.send("cpu")
        assert played.events >= args.streams * PER_CONNECTION * args.tokens, "events are missing"
        return played, (pipe.recv() - before) / played.events

    for way in ("step", "burst"):
        names = [f"{n}-{way}" for n in ("bare", "fastapi", "front")]
        rounds: dict[str, list[tuple[Round, float]]] = {n: [] for n in names}
        for i in range(args.rounds + 1):
            for name in names[i % 3 :] + names[: i % 3]:
                result = await measured(name)
                if i:  # the first round warms up
                    rounds[name].append(result)
        base = rounds[names[0]]
        for name in names:
            wall = [r.rate / b.rate for (r, _), (b, _) in zip(rounds[name], base, strict=True)]
            cpu = [b / c for (_, c), (_, b) in zip(rounds[name], base, strict=True)]
            rate = statistics.median(r.rate for r, _ in rounds[name])
            micro = statistics.median(c for _, c in rounds[name]) * 1e6
            print(f"{name:14} {rate:9,.0f} events/s {micro:6.1f} us CPU each; wall {shown(wall)}, cpu {shown(cpu)}")
    pipe.send("end")
    process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    uvloop.run(main(parser.parse_args()))
