"""What a peer that does not know the secret can do to a listener: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest

from workers.api import channel as channels
from workers.api.channel import Channel, dial, listen
from workers.api.wire import ENGINE_CODEC, WIRE_VERSION, Abort

SECRET = "a secret"


class Nobody:
    """Counts what gets through."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.twice = asyncio.Event()  # set with the second thing heard

    def opened(self, channel: Channel) -> None:
        self.heard.append("opened")

    def received(self, channel: Channel, message: Any) -> None:
        self.heard.append(message)
        if len(self.heard) == 2:
            self.twice.set()

    def closed(self, channel: Channel, reason: str) -> None:
        self.heard.append("closed")


@pytest.fixture
async def stranger() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Nobody]]:
    nobody = Nobody()
    listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=nobody)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    yield reader, writer, nobody
    writer.close()
    await listener.close()


def frame(value: Any) -> bytes:
    body = msgpack.packb(value)
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "sent",
    [
        (1 << 20).to_bytes(4, "little"),  # a megabyte is announced
        frame([0, WIRE_VERSION, 5, "a number is no secret"]),
        frame([0, WIRE_VERSION, None, "nor is nothing"]),
        frame([0, WIRE_VERSION, "wrong", "me"]),
        frame([1]),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_stranger_is_cut_off_at_once(stranger: Any, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer, nobody = stranger
    writer.write(sent)
    async with asyncio.timeout(2):
        assert await reader.read() == b""
    assert nobody.heard == []
    assert [r.levelno for r in caplog.records if r.levelno > logging.WARNING] == []


async def test_a_stranger_that_dribbles_is_cut_off(stranger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "GREETING_SECONDS", 0.5)
    reader, writer, nobody = stranger
    writer.write((4000).to_bytes(4, "little"))

    async def dribble() -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.05)

    task = asyncio.create_task(dribble())
    try:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):  # an end that is not orderly is an end as well
                assert await reader.read() == b""
    finally:
        task.cancel()
    assert nobody.heard == []


async def test_after_the_greeting_frames_may_be_large() -> None:
    here, there = Nobody(), Nobody()
    listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=here)
    channel = await dial("127.0.0.1", listener.port, codec=ENGINE_CODEC, secret=SECRET, name="me", handler=there)
    large = Abort(tuple(f"request {i}" for i in range(10_000)))
    channel.send(large)
    async with asyncio.timeout(5):
        await here.twice.wait()
    assert here.heard == ["opened", large]
    channel.close()
    await listener.close()
