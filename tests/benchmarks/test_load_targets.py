"""The targets of the load programs: our engine, a server, transformers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from aiohttp import web
from load.engine_target import EngineTarget, folder_of, load_rank
from load.http_target import HttpTarget
from load.options import measure
from load.transformers_target import GenerateTarget, load_model
from load.work import Pacing, Work, fixed_work
from rich.console import Console

from workers.api.config import EngineConfig

WORK = fixed_work(6, 12, 5, vocab=500, rep=0)


def quiet() -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def engine() -> EngineTarget:
    return EngineTarget(load_rank("demo", EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)))


@pytest.mark.parametrize("pacing", [Pacing(), Pacing(concurrency=1), Pacing(concurrency=2, rate=200.0)])
def test_the_engine_gives_every_token(engine: EngineTarget, pacing: Pacing) -> None:
    ended: list[int] = []
    run = engine.run(WORK, pacing, lambda: ended.append(1))
    assert len(ended) == len(WORK)
    assert [(r.prompt_tokens, r.tokens, len(r.times), r.error) for r in run.records] == [(12, 5, 5, "")] * 6
    assert all(r.began <= r.times[0] and r.times == sorted(r.times) for r in run.records)
    if pacing.concurrency == 1:
        order = [(r.began, r.times[-1]) for r in run.records]
        assert all(a[1] <= b[0] for a, b in pairwise(order))


def test_a_request_that_the_engine_refuses_is_an_error(engine: EngineTarget) -> None:
    run = engine.run([Work((5,) * 100_000, 4)], Pacing(), quiet)
    assert run.records[0].error
    with pytest.raises(SystemExit, match="1 of 1 requests failed"):
        measure({"engine": engine}, lambda rep: [Work((5,) * 100_000, 4)], Pacing(), repeat=1, title="", console=dumb())


def dumb() -> Console:
    return Console(quiet=True)


def test_measure_warms_up_and_takes_turns(engine: EngineTarget) -> None:
    asked: list[int] = []

    def make(rep: int) -> list[Work]:
        asked.append(rep)
        return WORK[:2]

    runs = measure({"a": engine, "b": engine}, make, Pacing(), repeat=2, title="t", console=dumb())
    assert asked == [0, 1, 2]
    assert {name: len(r) for name, r in runs.items()} == {"a": 2, "b": 2}


def test_generate_runs_the_same_work(engine: EngineTarget) -> None:
    model = load_model(folder_of("demo"), dtype=torch.float32, device=torch.device("cpu"), random=False)
    ended: list[int] = []
    run = GenerateTarget(model).run(WORK, Pacing(concurrency=4), lambda: ended.append(1))
    assert [(r.prompt_tokens, r.tokens) for r in run.records] == [(12, 5)] * 6
    assert len(ended) == 6
    with pytest.raises(SystemExit, match="request-rate"):
        GenerateTarget(model).run(WORK, Pacing(rate=1.0), quiet)


class Server:
    """Answers streams of as many chunks as tokens are asked for; `fail` makes it answer 503."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fail = False
        self.running = self.most = 0
        self.port = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fail:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        self.running += 1
        self.most = max(self.most, self.running)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for _ in range(body["max_tokens"]):
            await self._send(answer, {"choices": [{"text": "x"}]})
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        await asyncio.sleep(0.01)
        await self._send(answer, {"choices": [], "usage": usage})
        await answer.write(b"data: [DONE]\n\n")
        self.running -= 1
        return answer

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    @staticmethod
    async def _send(answer: web.StreamResponse, event: dict[str, Any]) -> None:
        await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def server() -> Iterator[Server]:
    """In a thread with a loop of its own."""
    found, loop, started = Server(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/completions", found.complete)
        app.router.add_get("/v1/models", found.models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.port = runner.addresses[0][1]
        started.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    yield found
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    assert not thread.is_alive()


def test_a_server_is_asked_for_ids_and_counted_by_its_usage(server: Server) -> None:
    target = HttpTarget(f"http://127.0.0.1:{server.port}/v1/", None, decode=None)
    run = target.run(WORK, Pacing(concurrency=2), quiet)
    assert [(r.prompt_tokens, r.tokens, r.cached_tokens, len(r.times), r.error) for r in run.records] == [
        (12, 5, 3, 5, "")
    ] * 6
    assert server.most == 2
    assert [tuple(b["prompt"]) for b in server.bodies] == [w.prompt for w in WORK]
    assert {b["model"] for b in server.bodies} == {"first"}
    assert all(b["ignore_eos"] and b["stream_options"] == {"include_usage": True} for b in server.bodies)


def test_a_server_that_refuses_is_an_error(server: Server) -> None:
    server.fail = True
    target = HttpTarget(f"http://127.0.0.1:{server.port}", "m", decode=lambda ids: "hello", ignore_eos=False)
    run = target.run(WORK[:1], Pacing(), quiet)
    assert "503" in run.records[0].error
    assert "busy" in run.records[0].error
    (body,) = server.bodies
    assert body["prompt"] == "hello"
    assert "ignore_eos" not in body


def test_nobody_there() -> None:
    with pytest.raises(SystemExit, match="name it with --model"):
        HttpTarget("http://127.0.0.1:9", None, decode=None).run(WORK, Pacing(), quiet)
    run = HttpTarget("http://127.0.0.1:9", "m", decode=None).run(WORK[:1], Pacing(), quiet)
    assert "ConnectionRefused" in run.records[0].error or "Connect" in run.records[0].error
