"""Ray Serve alone under the same faults: a FastAPI ingress that streams from a deployment by its handle, fake engines.

The text-book application, with Serve's defaults but for a health check a second, so that it is at its best. Tokens are
numbers, one each TOKEN_SECONDS, so that every one that is lost or comes twice is seen.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, StreamingResponse

from chaos.processes import pids
from chaos.waiting import look, until

APP, ROUTE = "plain", "/plain"
REPLICAS = 2
STREAMS = 24
TOKENS = 400
TOKEN_SECONDS = 0.02
FLOWING = 5  # pieces that a stream has brought before the fault
LEAST = 8  # requests in flight at the fault; fewer are no trial
WATCHED_SECONDS = 20.0  # a client of a hung stream waits for so long, and is counted as hung
READY_SECONDS = 120.0


@serve.deployment(
    num_replicas=REPLICAS, max_ongoing_requests=1000, health_check_period_s=1, ray_actor_options={"num_cpus": 0}
)
class FakeEngine:
    """Counts."""

    async def generate(self, tokens: int) -> AsyncIterator[str]:
        """`tokens` numbers."""
        for n in range(tokens):
            await asyncio.sleep(TOKEN_SECONDS)
            yield f"{n}\n"

    async def whole(self, tokens: int) -> list[int]:
        """The same in one piece."""
        await asyncio.sleep(TOKEN_SECONDS * tokens)
        return list(range(tokens))


def plain_application() -> serve.Application:
    """Made here, so that no module of ours is imported by it."""
    front = FastAPI()

    @serve.deployment(
        num_replicas=1, max_ongoing_requests=1000, health_check_period_s=1, ray_actor_options={"num_cpus": 0}
    )
    @serve.ingress(front)
    class Front:
        def __init__(self, engine: DeploymentHandle) -> None:
            self._engine = engine

        @front.get("/stream")
        async def stream(self, tokens: int) -> StreamingResponse:
            return StreamingResponse(self._engine.options(stream=True).generate.remote(tokens), media_type="text/plain")

        @front.get("/whole")
        async def whole(self, tokens: int) -> JSONResponse:
            return JSONResponse(await self._engine.whole.remote(tokens))

    return Front.bind(FakeEngine.bind())


@dataclass(slots=True)
class _Stream:
    arrivals: list[float] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    fate: str = ""

    @property
    def has_not_begun(self) -> bool:
        """Whether it is still to bring the pieces that it should have before the fault."""
        return not self.fate and len(self.arrivals) < FLOWING

    def is_in_flight(self, kind: str) -> bool:
        """Whether a fault would hit its answer: in the middle of a stream, or while a whole one is made."""
        return not self.fate and (kind == "whole" or not self.has_not_begun)

    def pause(self, since: float) -> float:
        """The longest one that ended after `since`."""
        return max((b - a for a, b in pairwise([*self.arrivals, monotonic()]) if b > since), default=0.0)


async def _ask(host: str, port: int, stream: _Stream, kind: str) -> None:
    try:
        async with asyncio.timeout(WATCHED_SECONDS + TOKENS * TOKEN_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(
                f"GET {ROUTE}/{kind}?tokens={TOKENS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
            )
            try:
                while part := await reader.read(1 << 16):
                    stream.arrivals.append(monotonic())
                    stream.raw += part
            finally:
                writer.close()
    except TimeoutError:
        stream.fate = "hung"
    except OSError as e:
        stream.fate = f"{type(e).__name__}"
    if not stream.fate:
        stream.fate = _fate(bytes(stream.raw), kind)


def _fate(raw: bytes, kind: str) -> str:
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = head[9:12].decode()
    if status != "200":
        return f"status {status or 'none'}"
    if kind == "whole":
        return "exact"
    if b"transfer-encoding: chunked" in head.lower() and not raw.endswith(b"0\r\n\r\n"):
        return "torn"
    numbers = [line for line in rest.replace(b"\r\n", b"\n").split(b"\n") if line]
    return "exact" if numbers[-2:] == [b"%d" % (TOKENS - 1), b"0"] else "ended early"


async def plain_trial(host: str, port: int, fault: str, kind: str, rng: random.Random) -> dict[str, Any]:
    """What the clients of one trial saw: `fault` is kill or stop, of one of the replicas; `kind` stream or whole."""
    engines = await look(_engines)
    if len(engines) < REPLICAS and await until(lambda: len(_engines()) >= REPLICAS, READY_SECONDS) is None:
        return {"fault": fault, "kind": kind, "invalid": "the replicas did not come back"}
    streams = [_Stream() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(_ask(host, port, s, kind)) for s in streams]
    await _in_the_middle(streams, kind)
    victim = rng.choice(await look(_engines))
    in_flight = sum(s.is_in_flight(kind) for s in streams)
    os.kill(victim, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    at = monotonic()
    await asyncio.gather(*tasks)
    found: dict[str, Any] = {
        "fault": fault,
        "kind": kind,
        "invalid": "" if in_flight >= LEAST else f"only {in_flight} requests in flight at the fault, not {LEAST}",
        "in_flight": in_flight,
        "lost": sum(s.fate != "exact" for s in streams),
        "fates": dict(Counter(s.fate for s in streams)),
        "longest_pause": round(max(s.pause(at) if s.fate == "hung" else _closed_pause(s, at) for s in streams), 3),
    }
    if fault == "stop":
        os.kill(victim, signal.SIGKILL)
    await until(lambda: len([p for p in _engines() if p != victim]) >= REPLICAS, READY_SECONDS)
    return found


async def _in_the_middle(streams: list[_Stream], kind: str) -> None:
    """Every stream has brought tokens, or has ended; whole answers have had the time to be begun."""
    deadline = monotonic() + WATCHED_SECONDS
    while kind == "stream" and any(s.has_not_begun for s in streams) and monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)


def _closed_pause(stream: _Stream, since: float) -> float:
    return max((b - a for a, b in pairwise(stream.arrivals) if b > since), default=0.0)


def _engines() -> list[int]:
    return pids("plain engine")


async def beside(host: str, port: int, trials: int, seed: int, said: Callable[[str], None]) -> list[dict[str, Any]]:
    """Serve's own application comes up beside ours, suffers `trials` of each kind, and goes."""
    said("plain Ray Serve comes up")
    await look(lambda: serve.run(plain_application(), name=APP, route_prefix=ROUTE, blocking=False))
    rng = random.Random(seed)
    found = []
    try:
        await asyncio.sleep(2.0)
        await asyncio.gather(*(_ask(host, port, _Stream(), "stream") for _ in range(STREAMS)))  # handles find replicas
        for fault, kind in (("kill", "stream"), ("kill", "whole"), ("stop", "stream")):
            for n in range(trials):
                found.append(await plain_trial(host, port, fault, kind, rng))
                said(f"plain Ray Serve: {fault}, {kind}, {n + 1} of {trials}")
    finally:
        await look(lambda: serve.delete(APP))
    return found
