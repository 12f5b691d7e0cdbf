"""Streams over a real server to clients that read late: nothing is lost, held without end, or held up by them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import urllib.request

import pytest

from router.http import outlet
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from workers.api.errors import EngineFault

from .fakes import ANSWER, FakeGenerator, FakeStatus
from .raw_http import Connection
from .served import serving

CHAT = "/v1/chat/completions"
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
SMALL = 8192  # bytes of the kernel's buffers, at each end


@pytest.fixture
def served(tokenizer):
    generator = FakeGenerator(tokenizer, endless=True)
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 1 << 20)], generator, FakeStatus())
    with serving(app, SMALL) as address:
        yield generator, address


def ask(address, max_tokens: int) -> socket.socket:
    """A connection whose client has asked for a stream and reads nothing."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    s.settimeout(30)
    s.connect(address)
    body = json.dumps(HI | {"max_tokens": max_tokens, "ignore_eos": True}).encode()
    s.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return s


def ended(generator: FakeGenerator, count: int) -> None:
    deadline = time.monotonic() + 30
    while generator.closed < count:
        assert time.monotonic() < deadline, "a generation has not ended"
        time.sleep(0.005)


def text_of(events) -> str:
    return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])


def script(tokenizer, count: int) -> str:
    ids = tokenizer.encode(ANSWER)
    return tokenizer.decode((ids * (count // len(ids) + 1))[:count])


def test_who_reads_late_gets_every_event(served, tokenizer):
    """The engine is done before the client reads its first byte: what no buffer took was held."""
    generator, address = served
    with contextlib.closing(ask(address, 3000)) as late:
        ended(generator, 1)
        events = Connection._read(late).events
    assert text_of(events) == script(tokenizer, 3000)
    assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "length"


def test_who_reads_nothing_holds_nobody_up_and_is_given_up(served, tokenizer, monkeypatch):
    monkeypatch.setattr(outlet, "MOST_HELD", 300_000)
    generator, address = served
    with contextlib.closing(ask(address, 1 << 19)) as dead:
        with contextlib.closing(ask(address, 50)) as well:
            assert text_of(Connection._read(well).events) == script(tokenizer, 50)
        ended(generator, 2)
        assert generator.running == 0
        *events, error, nothing = Connection._read(dead).body.decode("ascii").split("\n\n")
    assert nothing == ""
    assert "behind" in json.loads(error.removeprefix("data: "))["error"]["message"]
    made = text_of(json.loads(e.removeprefix("data: ")) for e in events)
    assert len(made) > 100
    assert script(tokenizer, 1 << 19).startswith(made)


def test_events_go_straight_to_the_connection(served, monkeypatch):
    """Under uvicorn all but the beginning and the end of an answer pass by ASGI's layers."""
    generator, address = served
    generator.pause = 0.001
    sent = []
    relayed = outlet.Outlet.__call__

    async def counted(self, message):
        sent.append(message["type"])
        await relayed(self, message)

    monkeypatch.setattr(outlet.Outlet, "__call__", counted)
    with contextlib.closing(ask(address, 200)) as reader:
        assert len(Connection._read(reader).events) > 150
    assert len(sent) < 20
    with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/metrics") as page:
        assert 'echelon_streams_total{way="straight"} 1.0' in page.read().decode()


async def test_long_answers_that_end_in_one_turn_make_no_reader_slow():
    """As of a beam search for each of three prompts, whose answers come whole; then a reader that takes nothing."""
    sent, taken = [], asyncio.Event()
    taken.set()

    async def send(message):
        sent.append(len(message["body"]))
        await taken.wait()

    out = outlet.Outlet(send, 60.0, lambda: None)
    stream, work = outlet.EventStream(out, {}, outlet.Turn()), asyncio.get_running_loop().create_future()
    relaying = asyncio.create_task(stream.relay(work))
    await asyncio.sleep(0)
    for _ in range(3):
        stream.put("x" * outlet.MOST_HELD)
    await asyncio.sleep(0)
    assert sum(sent) == 3 * outlet.MOST_HELD
    taken.clear()
    stream.put("x")
    await asyncio.sleep(0)
    for _ in range(2):
        stream.put("x" * outlet.MOST_HELD)
    with pytest.raises(EngineFault, match="behind"):
        stream.put("x")
    taken.set()
    work.set_result(None)
    await relaying
    out.close()
