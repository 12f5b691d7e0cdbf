"""Faults that clients are: they leave, they read nothing, they are ten times too many, they fill the KV cache."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from chaos.fault import Fault, Scene
from chaos.judge import Fate
from chaos.oracle import MOST_TOKENS, Ask
from chaos.waiting import look

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site

LEAVERS = 12
LEAVER_BYTES = 4000
SLEEPERS = 4
SLEEPER_CHOICES = 16
FILLERS = 48
TIMES_OVER = 10
REFUSAL_SECONDS = 0.05


class _Leases(Fault):
    """Over when the dispatcher counts no lease of `own_requests` any more."""

    def __init__(self) -> None:
        super().__init__()
        self._others = 0

    def noticed(self, site: Site) -> bool:
        return sum(row.leases for row in site.rows()) <= self._others


class ClientsGone(_Leases):
    """Clients leave in the middle of their streams, half of them abruptly: their blocks come back within a step."""

    name: ClassVar[str] = "clients gone"
    hold: ClassVar[float] = 1.0

    async def inject(self, scene: Scene) -> None:
        scene.load.close()
        self.victim = f"{LEAVERS} clients"
        asks = [scene.oracle.ask(scene.rng, tokens=(MOST_TOKENS, MOST_TOKENS), choices=1) for _ in range(LEAVERS)]
        opened = await asyncio.gather(*(_begin(scene, ask, LEAVER_BYTES) for ask in asks))
        self._others = max(sum(row.leases for row in await look(scene.site.rows)) - LEAVERS, 0)
        self.at = monotonic()
        for number, writer in enumerate(opened):
            if number % 2:
                writer.transport.abort()
            writer.close()


class ClientsAsleep(_Leases):
    """Clients read nothing of very long answers: what is held for them is bounded, and they are closed in the end."""

    name: ClassVar[str] = "clients that read nothing"
    hold: ClassVar[float] = 1.0

    async def inject(self, scene: Scene) -> None:
        scene.load.close()
        self.victim = f"{SLEEPERS} clients"
        ask = replace(
            scene.oracle.ask(scene.rng, tokens=(MOST_TOKENS, MOST_TOKENS)), choices=SLEEPER_CHOICES, logprobs=True
        )
        loop = asyncio.get_running_loop()
        self._sockets = []
        for _ in range(SLEEPERS):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, (scene.site.host, scene.site.port))
            await loop.sock_sendall(sock, _wide(scene, ask))
            self._sockets.append(sock)
        await asyncio.sleep(0.5)
        self._others = 0
        self.at = monotonic()

    async def heal(self, scene: Scene) -> None:
        for sock in self._sockets:
            sock.close()


class CacheFull(Fault):
    """More long streams than the KV cache has room for: some are preempted and resume, none fails."""

    name: ClassVar[str] = "KV cache full"

    async def inject(self, scene: Scene) -> None:
        self._before = await look(lambda: _preemptions(scene.site))
        self.victim = f"{FILLERS} more streams of {MOST_TOKENS} tokens"
        self.at = monotonic()
        asks = [scene.oracle.ask(scene.rng, tokens=(MOST_TOKENS, MOST_TOKENS), choices=1) for _ in range(FILLERS)]
        self._tasks = [asyncio.create_task(scene.load.one(ask)) for ask in asks]

    def noticed(self, site: Site) -> bool:
        return bool(_preemptions(site) - self._before)

    async def after(self, scene: Scene) -> str:
        await asyncio.gather(*self._tasks)
        now = await look(lambda: _preemptions(scene.site))
        self.figures["preemptions"] = sum((now - self._before).values())
        return ""


class Overload(Fault):
    """Ten times the clients for some seconds: who is refused is refused at once, who is accepted gets all."""

    name: ClassVar[str] = "ten times the load"
    hold: ClassVar[float] = 20.0

    async def inject(self, scene: Scene) -> None:
        self.victim = f"{TIMES_OVER} times the streams"
        self._crowd = [asyncio.create_task(self._one(scene, n)) for n in range((TIMES_OVER - 1) * 24)]
        self._refusals: list[float] = []
        self.at = monotonic()

    async def _one(self, scene: Scene, number: int) -> None:
        for ask in scene.oracle.asks(f"crowd/{number}", tokens=(40, 120)):
            if monotonic() - self.at > self.hold:
                return
            seen = await scene.load.one(ask)
            assert seen.verdict is not None
            if seen.verdict.fate is Fate.REFUSED and seen.accepted is not None:
                self._refusals.append(seen.accepted - seen.began)

    def noticed(self, site: Site) -> bool:
        return True

    async def after(self, scene: Scene) -> str:
        await asyncio.gather(*self._crowd)
        began = monotonic()
        seen = await scene.load.one(scene.oracle.ask(scene.rng, tokens=(8, 16), choices=1))
        self.figures |= {"refused": len(self._refusals), "next_answer": (seen.ended or began) - began}
        if self._refusals:
            self.figures["slowest_refusal"] = max(self._refusals)
        return ""


async def _begin(scene: Scene, ask: Ask, size: int) -> asyncio.StreamWriter:
    """A stream of which `size` bytes were read."""
    reader, writer = await asyncio.open_connection(scene.site.host, scene.site.port)
    writer.write(scene.load.client.request(ask))
    await reader.readexactly(size)
    return writer


def _wide(scene: Scene, ask: Ask) -> bytes:
    """A request whose events are large: five log-probabilities a token."""
    raw = scene.load.client.request(ask)
    head, _, body = raw.partition(b"\r\n\r\n")
    body = body[:-1] + b', "top_logprobs": 20}'
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", b""]) + body


def _preemptions(site: Site) -> Counter[str]:
    return Counter({row.info.id: row.load.preemptions for row in site.rows()})
