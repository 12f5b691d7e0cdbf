"""Engines whose steps the shipped policy orders, a dispatcher and an ingress, over loopback sockets in one process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from engine_runs import Harness
from fake_executor import VOCAB

from router.dispatch.client import DispatcherClient
from router.dispatch.config import DispatcherConfig
from router.dispatch.server import DispatcherServer
from router.engine_link import EngineLinks
from router.generation import ChoiceDelta, GenerationRequest
from router.qos.fair_queue import FairQueue
from router.qos.file import make_qos_config
from router.qos.ledger import Prices
from router.qos.source import parse_source
from router.qos.steps import StepOrder, step_limits
from router.sessions import Sessions
from workers.api.replica import ReplicaInfo
from workers.api.request import SamplingParams
from workers.replica import EngineServer

SECRET = "s3cret"
MODEL = "m"


class Order(StepOrder):
    """Keeps at which step of its engine each request arrived and had its first token, and service after each step."""

    harness: Harness

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.arrived_at: dict[str, int] = {}  # by request: steps that its engine had committed
        self.first_at: dict[str, int] = {}  # the same when its first token was committed
        self.samples: list[dict[str, float]] = []  # of each step in which all accounts seen wait here: units by account

    def arrived(self, flow: object, request_id: str, since: float) -> None:
        self.arrived_at[request_id] = self.harness.engine.stats.steps
        super().arrived(flow, request_id, since)  # type: ignore[arg-type]

    def executed(self, *given: object) -> None:
        super().executed(*given)  # type: ignore[arg-type]
        engine = self.harness.engine
        for name, sequence in engine.roster.live.items():
            if sequence.num_emitted and name not in self.first_at:
                self.first_at[name] = engine.stats.steps
        standings = list(self.policy.standings)
        waits = all(s.queued for s in standings)
        self.samples.append({s.account.id: s.service for s in standings} if waits else {})


@dataclass
class Replica:
    harness: Harness
    order: Order
    server: EngineServer
    thread: threading.Thread


@dataclass
class Site:
    """Use as an async context; at the end every ledger is checked."""

    qos: str
    replicas: int = 1
    slots: int = 4
    num_blocks: int = 512
    budget: int = 32
    running: list[Replica] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = make_qos_config(parse_source(self.qos, "f", as_json=False))
        self.dispatcher_config = DispatcherConfig(qos=self.config, canary_every=math.inf, recovery=0.2)
        self._address: tuple[str, int] | None = None

    def _replica(self, number: int) -> Replica:
        limits = step_limits(Prices(), step_tokens=self.budget, pool_tokens=self.num_blocks * 4, context=64, tau=1e9)
        order = Order(self.config, limits)
        harness = Harness(
            max_num_seqs=self.slots,
            max_num_batched_tokens=self.budget,
            num_blocks=self.num_blocks,
            max_model_len=256,
            ordering=order,
        )
        order.harness = harness
        info = ReplicaInfo(f"r{number}", MODEL, "", 0, 256, self.slots, self.num_blocks, 4, "", 0, self.budget)
        server = EngineServer(harness.engine, info, SECRET)
        server.start("127.0.0.1")
        return Replica(harness, order, server, threading.Thread(target=server.run))

    async def _locate(self) -> tuple[str, int]:
        if self._address is None:
            raise ConnectionError("no dispatcher")
        return self._address

    async def start_dispatcher(self) -> None:
        self.server = DispatcherServer(self.dispatcher_config, secret=SECRET, rng=random.Random(0))
        self._address = await self.server.start()
        for replica in self.running:
            self.server.register(replica.server.info)
        await until(lambda: len(self.server.status().rows) == self.replicas)
        await until(
            lambda: not self.config.enabled or all(r.tiered for r in self.server.dispatcher._registry.replicas.values())
        )

    async def stop_dispatcher(self) -> None:
        self._address = None
        await self.server.close()
        await until(lambda: not self.client.connected)

    async def __aenter__(self) -> Site:
        self.running = [self._replica(i) for i in range(self.replicas)]
        for replica in self.running:
            replica.thread.start()
        await self.start_dispatcher()
        self.client = DispatcherClient("ingress", secret=SECRET, locate=self._locate)
        self.client.start()
        self.sessions = Sessions(self.client, EngineLinks("ingress", secret=SECRET))
        await until(lambda: self.client.connected)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.sessions.close()
        await until(lambda: all(not r.harness.engine.has_work for r in self.running))
        if not any(exc):
            await until(lambda: self.room.policy.ledger.executed == self.executed)  # the last report
            ledger = self.room.policy.ledger
            assert (ledger.missing, ledger.overhead) == (0, sum(r.harness.engine.stats.overhead for r in self.running))
            assert self.server.ledger().balanced
        await self.server.close()
        for replica in self.running:
            replica.server.stop()
            replica.thread.join(10)
            replica.harness.engine.check_ledgers()
            assert replica.order.policy.ledger.missing == 0
        await asyncio.sleep(0.01)

    @property
    def room(self) -> FairQueue:  # type: ignore[type-arg]
        room = self.server.dispatcher._registry.fleet(MODEL).queue
        assert isinstance(room, FairQueue)
        return room

    @property
    def executed(self) -> int:
        """Tokens, by all engines."""
        return sum(r.harness.engine.stats.executed for r in self.running)

    async def ask(self, name: str, owner: str, *, prompt: int = 12, output: int = 20) -> list[int]:
        """The tokens of one request, at its end."""
        ids = tuple((sum(map(ord, name)) * 7 + i * 5) % VOCAB for i in range(prompt))
        request = GenerationRequest(name, MODEL, ids, (SamplingParams(max_tokens=output, seed=len(name)),), owner=owner)
        tokens: list[int] = []

        def take(batch: tuple[ChoiceDelta, ...]) -> bool:
            for part in batch:
                tokens.extend(part.delta.token_ids)
            return True

        await self.sessions.generate(request, take)
        return tokens


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for `condition()`; the time is a safety net."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions here have no event
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def asking(*requests: object) -> AsyncIterator[list[asyncio.Task[list[int]]]]:
    """The requests run beside the block; those that have not ended by then are given up."""
    tasks = [asyncio.ensure_future(r) for r in requests]  # type: ignore[arg-type]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
