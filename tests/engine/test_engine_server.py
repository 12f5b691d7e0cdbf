"""An engine behind its socket: what goes wrong with one request is that request's alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from engine_runs import Harness, request
from fake_executor import beam_oracle, oracle

from router.dispatch.prefixes import _cut
from workers.api import wire
from workers.api.channel import Channel, dial
from workers.api.hashing import SHORT_BYTES, block_hashes
from workers.api.replica import CacheNews, ReplicaInfo
from workers.api.request import BeamParams, Delta, EngineRequest, FinishReason
from workers.api.wire import ENGINE_CODEC, StepFrame, Submit
from workers.replica import EngineServer

SECRET = "a secret"


class Client:
    """Gathers deltas by request; `ended` holds the last ones."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Delta] = {}
        self.changed = asyncio.Event()

    def opened(self, channel: Channel) -> None:
        pass

    def received(self, channel: Channel, message: Any) -> None:
        if isinstance(message, StepFrame):
            for delta in message.deltas:
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.finish is not None:
                    self.ended[delta.request_id] = delta
            self.changed.set()

    def closed(self, channel: Channel, reason: str) -> None:
        self.changed.set()

    async def until_ended(self, *names: str) -> None:
        async with asyncio.timeout(10):
            while not set(names) <= self.ended.keys():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def serving(harness: Harness) -> AsyncIterator[tuple[Client, Channel]]:
    """A client of a running server; the engine's ledgers are checked at the end."""
    info = ReplicaInfo("r", "m", "", 0, harness.engine.max_model_len, 8, num_blocks=harness.num_blocks, block_size=4)
    server = EngineServer(harness.engine, info, SECRET)
    port = server.start("127.0.0.1").port
    stepping = threading.Thread(target=server.run)
    stepping.start()
    client = Client()
    try:
        yield client, await dial("127.0.0.1", port, codec=ENGINE_CODEC, secret=SECRET, name="test", handler=client)
    finally:
        server.stop()
        await asyncio.to_thread(stepping.join, 10)
    assert not stepping.is_alive()
    harness.check_idle()


GOOD = request("good", range(1, 9), max_tokens=12)


async def test_a_request_that_breaks_the_engines_door_harms_no_other() -> None:
    harness = Harness()
    take = harness.engine.submit

    def submit(asked: EngineRequest) -> None:
        if asked.id == "bad":
            raise TypeError("not what anybody expected")
        take(asked)

    harness.engine.submit = submit  # type: ignore[method-assign]
    async with serving(harness) as (client, channel):
        channel.send(Submit((request("bad", [1, 2, 3]), GOOD)))
        await client.until_ended("bad", "good")
        assert client.ended["bad"].finish is FinishReason.ERROR
        assert "TypeError" in (client.ended["bad"].error or "")
        assert (client.tokens["good"], client.ended["good"].finish) == oracle(GOOD, harness.engine.max_model_len)


async def test_a_replay_without_room_ends_by_length() -> None:
    harness = Harness(max_model_len=16)
    resumed = request("replayed", range(10), max_tokens=30, resumed_ids=tuple(range(6)))
    async with serving(harness) as (client, channel):
        channel.send(Submit((resumed, request("fresh", range(16)))))
        await client.until_ended("replayed", "fresh")
        assert (client.ended["replayed"].finish, client.ended["replayed"].position) == (FinishReason.LENGTH, 6)
        assert client.ended["fresh"].finish is FinishReason.ERROR
        assert "context" in (client.ended["fresh"].error or "")


class NewsReader(Client):
    """An observer, or one who is not, that keeps the news."""

    def __init__(self) -> None:
        super().__init__()
        self.news: list[CacheNews] = []

    def received(self, channel: Channel, message: Any) -> None:
        if isinstance(message, CacheNews):
            self.news.append(message)
        super().received(channel, message)


async def test_observers_alone_hear_what_the_prefix_cache_holds_the_late_ones_too() -> None:
    harness = Harness()
    async with serving(harness) as (client, channel):
        port = channel._transport.get_extra_info("peername")[1]  # type: ignore[union-attr]
        readers = [NewsReader() for _ in range(3)]
        names = ["ingress", "observer/first", "observer/late"]
        for reader, name in zip(readers[:2], names, strict=False):
            await dial("127.0.0.1", port, codec=ENGINE_CODEC, secret=SECRET, name=name, handler=reader)
        channel.send(Submit((GOOD,)))
        await client.until_ended("good")
        await dial("127.0.0.1", port, codec=ENGINE_CODEC, secret=SECRET, name=names[2], handler=readers[2])
        held = sorted(digest[:SHORT_BYTES] for digest in block_hashes([*range(1, 9), *client.tokens["good"][:-1]], 4))
        for reader in readers[1:]:
            async with asyncio.timeout(10):
                while not reader.news or sorted(_cut(reader.news[-1].gained)) != held:
                    reader.changed.clear()
                    await reader.changed.wait()
            assert reader.news[-1].anew
        assert not readers[0].news


async def test_answers_of_a_search_that_fill_a_frame_come_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    asked = replace(request("wide", range(1, 9), 60, temperature=0.0), beams=BeamParams(8))
    async with serving(harness) as (client, channel):
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 600)
        channel.send(Submit((asked,)))
        await client.until_ended(*asked.answer_ids)
    found = [(tuple(client.tokens[name]), client.ended[name].finish) for name in asked.answer_ids]
    assert found == beam_oracle(asked, 128)
