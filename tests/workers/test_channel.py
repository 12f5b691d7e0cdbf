"""Framed connections over real sockets, on asyncio's loop and on uvloop, which Ray installs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from workers.api import channel as channels
from workers.api.channel import Channel, dial, listen
from workers.api.errors import WireError
from workers.api.replica import LoadReport
from workers.api.request import Delta, EngineRequest, FinishReason, MediaSegment, SamplingParams, TokenLogprobs
from workers.api.wire import ENGINE_CODEC, Abort, FrameSplitter, StepFrame, Submit

SECRET = "a secret"
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]


class Recorder:
    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.messages: list[Any] = []
        self.closings: list[str] = []
        self.changed = asyncio.Event()

    def opened(self, channel: Channel) -> None:
        self.channels.append(channel)
        self.changed.set()

    def received(self, channel: Channel, message: Any) -> None:
        self.messages.append(message)
        self.changed.set()

    def closed(self, channel: Channel, reason: str) -> None:
        self.closings.append(reason)
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], main: Any) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


REQUEST = EngineRequest(
    "r", (1, 2, 3), SamplingParams(5, seed=2**64 - 1, logit_bias=((3, -1.5),)), (4,), media=(MediaSegment(0, 1, b"x"),)
)
DELTA = Delta("r", 3, (7,), (TokenLogprobs(7, -0.5, 1, ((7, -0.5), (2, -1.0))),), FinishReason.STOP, executed_prefill=3)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_messages_arrive_as_they_left(loop_factory: Any) -> None:
    async def main() -> None:
        server, client = Recorder(), Recorder()
        listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=server)
        channel = await dial(listener.host, listener.port, codec=ENGINE_CODEC, secret=SECRET, name="me", handler=client)
        channel.send(Submit((REQUEST,)))
        channel.send(Abort(("r",)))
        await server.until(lambda: len(server.messages) == 2)
        assert server.messages == [Submit((REQUEST,)), Abort(("r",))]
        assert server.channels[0].peer == "me"
        frame = StepFrame((DELTA,), LoadReport(1))
        server.channels[0].send(frame)
        await client.until(lambda: client.messages)
        assert client.messages == [frame]
        channel.close()
        await server.until(lambda: server.closings)
        await listener.close()

    run(loop_factory, main)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_wrong_secret_opens_nothing(loop_factory: Any) -> None:
    async def main() -> None:
        server, client = Recorder(), Recorder()
        listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=server)
        await dial(listener.host, listener.port, codec=ENGINE_CODEC, secret="guess", name="me", handler=client)
        await client.until(lambda: client.closings)
        assert not server.channels
        await listener.close()

    run(loop_factory, main)


def test_a_silent_peer_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "DIALLED_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(channels, "HEARTBEAT_SECONDS", 0.05)

    async def main() -> None:
        stop = asyncio.Event()

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await stop.wait()  # accepts, then says nothing
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        client = Recorder()
        await dial(host, port, codec=ENGINE_CODEC, secret=SECRET, name="me", handler=client)
        await client.until(lambda: client.closings)
        assert "silent" in client.closings[0]
        stop.set()
        server.close()
        await server.wait_closed()

    run(asyncio.new_event_loop, main)


def test_any_split_of_the_bytes_gives_the_same_frames() -> None:
    messages = [Submit((REQUEST,)), Abort(("a", "b")), StepFrame((DELTA,), LoadReport(2))]
    data = b"".join(ENGINE_CODEC.encode(m) for m in messages)
    for size in (1, 2, 3, 5, 7, 64, len(data)):
        splitter = FrameSplitter()
        bodies = [b for i in range(0, len(data), size) for b in splitter.feed(data[i : i + size])]
        assert [ENGINE_CODEC.decode(b) for b in bodies] == messages


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"\x91\x7f", b"\x92\x04\x93\x01\x02\x03\x04", b"\xa3abc"])
def test_what_is_not_a_frame_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        ENGINE_CODEC.decode(body)


def test_a_huge_length_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(WireError, match="over"):
        list(FrameSplitter().feed(b"\xff\xff\xff\xff"))
