"""A fake engine endpoint with scripted tokens, and a dispatcher that can be killed, all over loopback sockets."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.dispatch.client import DispatcherClient
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.server import DispatcherServer
from router.engine_link import EngineLinks
from router.generation import ChoiceDelta, GenerationRequest
from router.sessions import Sessions
from workers.api.channel import Channel, Listener, listen
from workers.api.replica import LoadReport, ReplicaInfo
from workers.api.request import Delta, EngineRequest, FinishReason, SamplingParams
from workers.api.wire import ENGINE_CODEC, Abort, StepFrame, Submit, Welcome

SECRET = "s3cret"
MODEL = "demo"


def token(known: Sequence[int], position: int, choice: int = 0) -> int:
    """The next token: depends on everything before it, as a model's does."""
    return (sum(known) * 31 + len(known) * 7 + position * 13 + choice * 101) % 50_000


def expected_tokens(prompt: Sequence[int], n: int, choice: int = 0) -> list[int]:
    """What an undisturbed run emits."""
    known = list(prompt)
    for position in range(n):
        known.append(token(known, position, choice))
    return known[len(prompt) :]


@dataclass
class _Sequence:
    request: EngineRequest
    channel: Channel
    emitted: list[int] = field(default_factory=list)


class FakeEngine:
    """One token a sequence and step. `step_seconds` may be changed at any time; `hold` stops the steps."""

    def __init__(self, replica_id: str, *, model: str = MODEL, slots: int = 8, step_seconds: float = 0.002) -> None:
        self.id, self.model, self.slots, self.step_seconds = replica_id, model, slots, step_seconds
        self.hold = False
        self.idle_steps = True  # counts steps while it has nothing to do, which a real one does not
        self.fail_with: str | None = None  # the next delta of every sequence is this error
        self.skip_position = False  # leaves a gap once
        self.repeat = False  # sends every delta twice
        self.aborted: list[str] = []
        self.submitted: list[EngineRequest] = []
        self.sequences: dict[str, _Sequence] = {}
        self.channels: list[Channel] = []
        self._steps = 0
        self._listener: Listener | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> ReplicaInfo:
        self._listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=self)
        self._task = asyncio.create_task(self._run())
        return self.info

    @property
    def info(self) -> ReplicaInfo:
        assert self._listener is not None
        return ReplicaInfo(
            self.id, self.model, "127.0.0.1", self._listener.port, 4096, self.slots, num_blocks=1024, block_size=16
        )

    async def kill(self) -> None:
        """As kill -9: nothing more is sent, all sockets are cut."""
        assert self._listener is not None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._listener.close()
        for channel in list(self.channels):
            assert channel._transport is not None
            channel._transport.abort()

    # Handler

    def opened(self, channel: Channel) -> None:
        self.channels.append(channel)
        channel.send(Welcome(self.info))

    def received(self, channel: Channel, message: object) -> None:
        if isinstance(message, Submit):
            for request in message.requests:
                self.submitted.append(request)
                self.sequences[request.id] = _Sequence(request, channel, list(request.resumed_ids))
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self.aborted.append(request_id)
                if (gone := self.sequences.pop(request_id, None)) is not None:
                    last = Delta(request_id, len(gone.emitted), finish=FinishReason.ABORT)
                    channel.send(StepFrame((last,), self.load()))

    def closed(self, channel: Channel, reason: str) -> None:
        self.channels.remove(channel)
        for request_id in [i for i, s in self.sequences.items() if s.channel is channel]:
            del self.sequences[request_id]
            self.aborted.append(request_id)

    # steps

    def load(self, decoded: int = 0) -> LoadReport:
        return LoadReport(
            step=self._steps,
            step_seconds=self.step_seconds,
            decode_tokens=decoded,
            running=len(self.sequences),
            free_blocks=1024,
            total_blocks=1024,
        )

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            if not self.hold:
                self.step()

    def step(self) -> None:
        self._steps += self.idle_steps or bool(self.sequences)
        deltas: dict[Channel, list[Delta]] = {}
        decoded = len(self.sequences)
        for request_id, sequence in list(self.sequences.items()):
            delta = self._next(sequence)
            deltas.setdefault(sequence.channel, []).extend([delta] * (2 if self.repeat and not delta.finish else 1))
            if delta.finish is not None:
                del self.sequences[request_id]
        self.fail_with = None if deltas else self.fail_with
        for channel in self.channels:
            if channel in deltas or channel.peer.startswith("observer"):
                channel.send(StepFrame(tuple(deltas.get(channel, ())), self.load(decoded)))

    def _next(self, sequence: _Sequence) -> Delta:
        request, emitted = sequence.request, sequence.emitted
        position = len(emitted)
        if self.fail_with is not None:
            return Delta(request.id, position, finish=FinishReason.ERROR, error=self.fail_with)
        emitted.append(token((*request.prompt_ids, *emitted), position, request.sampling.choice))
        finish = None
        if emitted[-1] in request.sampling.stop_ids:
            finish = FinishReason.STOP
        elif len(emitted) >= request.sampling.max_tokens:
            finish = FinishReason.LENGTH
        if self.skip_position and finish is None:
            self.skip_position = False
            return self._next(sequence)
        executed = len(emitted) - len(request.resumed_ids)
        return Delta(
            request.id,
            position,
            (emitted[-1],),
            finish=finish,
            executed_prefill=len(request.known_ids) if finish else 0,
            executed_decode=executed if finish else 0,
        )


class Cluster:
    """Engines, a dispatcher and one ingress. Use as an async context."""

    def __init__(self, engines: int = 2, *, config: DispatcherConfig | None = None) -> None:
        self.engines = [FakeEngine(f"r{i}") for i in range(engines)]
        self.config = config or DispatcherConfig(exclusion_grace=0.2, replica_grace=0.3, canary_every=math.inf)
        self.server = self._server()
        self.client = DispatcherClient("ingress-1", secret=SECRET, locate=self._locate)
        self.links = EngineLinks("ingress-1", secret=SECRET)
        self.sessions = Sessions(self.client, self.links)
        self._address: tuple[str, int] | None = None

    def _server(self) -> DispatcherServer:
        return DispatcherServer(self.config, secret=SECRET, rng=random.Random(0))

    async def _locate(self) -> tuple[str, int]:
        if self._address is None:
            raise ConnectionError("no dispatcher")
        return self._address

    async def start_dispatcher(self) -> None:
        self.server = self._server()
        self._address = await self.server.start()
        for engine in self.engines:
            if engine._task is not None:
                self.server.register(engine.info)

    async def stop_dispatcher(self) -> None:
        self._address = None
        await self.server.close()
        await until(lambda: not self.client.connected)

    async def __aenter__(self) -> Cluster:
        for engine in self.engines:
            await engine.start()
        await self.start_dispatcher()
        self.client.start()
        await until(lambda: self.client.connected and len(self.server.status().rows) == len(self.engines))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.sessions.close()
        await self.server.close()
        for engine in self.engines:
            await engine.kill()
        await asyncio.sleep(0.01)  # closed connections tell their handlers

    @property
    def engine_of(self) -> dict[str, FakeEngine]:
        """The engine that runs each sequence now."""
        return {i: e for e in self.engines for i in e.sequences}


async def until(condition: object, seconds: float = 10.0) -> None:
    """Wait for `condition()`; the time is a safety net."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions here have no event
            await asyncio.sleep(0.001)


def generation(
    name: str, prompt: Sequence[int] = (1, 2, 3), *, n: int = 1, max_tokens: int = 20, stop_ids: tuple[int, ...] = ()
) -> GenerationRequest:
    samplings = tuple(SamplingParams(max_tokens=max_tokens, choice=i, seed=7, stop_ids=stop_ids) for i in range(n))
    return GenerationRequest(id=name, model=MODEL, prompt_ids=tuple(prompt), samplings=samplings)


@dataclass
class Collected:
    """What a reader got, checked as it came: gapless positions, one finish a choice."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, FinishReason] = field(default_factory=dict)
    batches: int = 0

    def add(self, batch: tuple[ChoiceDelta, ...]) -> None:
        self.batches += 1
        for item in batch:
            got = self.tokens.setdefault(item.choice, [])
            assert item.choice not in self.finish, "a delta after the last one"
            assert item.delta.position == len(got), "a gap or a duplicate"
            got.extend(item.delta.token_ids)
            if item.delta.finish is not None:
                self.finish[item.choice] = item.delta.finish
