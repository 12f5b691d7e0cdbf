"""Bodies that come slowly, are too large or stay half-sent, on real connections; and whose requests they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket

import httpx
import pytest
import uvicorn

from router.http.app import create_app
from router.http.config import Cors, FrontConfig, ServedModel
from router.http.gate import Gate
from router.http.identity import Identity
from workers.api.errors import ConfigError, NotAuthorized

from .fakes import FakeGenerator, FakeStatus

CHAT = "/v1/chat/completions"
HI = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
SECRET = "proof"


@contextlib.asynccontextmanager
async def serving(tokenizer, **limits):
    """A generator and the port of a server in front of it."""
    generator = FakeGenerator(tokenizer)
    app = create_app(FrontConfig(**limits), [ServedModel("m", tokenizer, 256)], generator, FakeStatus())
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, proxy_headers=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield generator, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


def post(*headers: str, path: str = CHAT) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
    ).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", "0")))


async def refused_and_closed(reader: asyncio.StreamReader, status: int, code: str | None) -> None:
    found, headers, body = await answer(reader)
    error = json.loads(body)["error"]
    assert (found, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert headers["x-request-id"]
    assert headers["connection"] == "close"
    with contextlib.suppress(ConnectionResetError):  # we went on sending after the end
        assert await reader.read() == b""


@pytest.mark.parametrize("framing", ["content-length: 5000", "transfer-encoding: chunked"])
async def test_a_body_that_stays_half_sent_is_ended(tokenizer, framing):
    async with serving(tokenizer, body_grace_seconds=0.2) as (generator, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(framing) + (b"1\r\n{" if "chunked" in framing else b"{"))
        await refused_and_closed(reader, 408, "request_timeout")
        writer.close()
        assert not generator.requests


@pytest.mark.parametrize(
    "limits",
    [
        {"body_grace_seconds": 0.3, "body_min_rate": 1_000_000},  # each byte earns next to nothing
        {
            "body_seconds": 0.5,
            "body_grace_seconds": 0.4,
            "body_min_rate": 1,
        },  # each byte earns a second, the end stands
    ],
)
async def test_a_body_that_trickles_is_ended(tokenizer, limits):
    async with serving(tokenizer, **limits) as (generator, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("content-length: 100000"))
        ended = asyncio.create_task(refused_and_closed(reader, 408, "request_timeout"))
        while not ended.done():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        await ended
        writer.close()
        assert not generator.requests


async def test_a_slow_body_that_keeps_its_pace_is_read(tokenizer):
    async with serving(tokenizer, body_grace_seconds=0.3, body_min_rate=20) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = HI + b" " * 200
        writer.write(post(f"content-length: {len(body)}"))
        for at in range(0, len(body), 20):  # 0.6 s in all: longer than the grace
            writer.write(body[at : at + 20])
            await asyncio.sleep(0.04)
        assert (await answer(reader))[0] == 200
        writer.close()


async def test_a_length_over_the_cap_is_refused_unread(tokenizer):
    async with serving(tokenizer, max_body_bytes=1024) as (_, port):
        for headers in (["content-length: 1025"], ["content-length: 99999999999999999", "expect: 100-continue"]):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(*headers))
            await refused_and_closed(reader, 413, "request_too_large")
            writer.close()


async def test_pieces_over_the_cap_are_refused_while_they_come(tokenizer):
    async with serving(tokenizer, max_body_bytes=1024) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("transfer-encoding: chunked") + (b"200\r\n" + b" " * 512 + b"\r\n") * 2)
        await writer.drain()
        assert not reader.at_eof()
        writer.write(b"1\r\n \r\n")  # one byte too many, and the end is still to come
        await refused_and_closed(reader, 413, "request_too_large")
        writer.close()


async def test_expect_100_continue(tokenizer):
    async with serving(tokenizer) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(f"content-length: {len(HI)}", "expect: 100-continue"))
        assert (await answer(reader))[0] == 100
        writer.write(HI)
        status, headers, _ = await answer(reader)
        assert status == 200
        assert "connection" not in headers
        writer.write(post(f"content-length: {len(HI)}") + HI)
        assert (await answer(reader))[0] == 200
        writer.close()


async def test_a_client_that_leaves_while_it_sends_leaves_nothing(tokenizer, caplog):
    async with serving(tokenizer) as (generator, port):
        before = asyncio.all_tasks()
        with caplog.at_level(logging.INFO):
            for _ in range(5):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(post(f"content-length: {len(HI)}") + HI[:-5])
                await writer.drain()
                await asyncio.sleep(0.02)
                writer.close()
                await writer.wait_closed()
            while asyncio.all_tasks() != before:  # noqa: ASYNC110 - endless when one is left behind
                await asyncio.sleep(0.01)
        assert not generator.requests
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_an_answer_before_the_body_ends_the_connection(tokenizer):
    async with serving(tokenizer) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("content-length: 100", path="/v1/nope"))
        await refused_and_closed(reader, 404, "unknown_url")
        writer.close()


async def asked_by(shown: list[bytes], told: bytes, *, secret: str) -> tuple[str, list[bytes]]:
    """The client's address as a resolver sees it, and the names of the headers that get as far as the application."""
    seen: list[str | None] = []
    passed: list[bytes] = []

    class Watching:
        def resolve(self, headers, client):
            seen.append(client)
            return Identity()

    async def app(scope, receive, send):
        passed.extend(name for name, _ in scope["headers"])
        assert scope["client"][0] == seen[0]

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [(b"x-forwarded-for", told), *((b"x-echelon-edge", s) for s in shown)],
        "client": ("198.51.100.7", 4711),
        "scheme": "http",
    }
    await Gate(app, Watching(), edge_secret=secret)(scope, None, None)
    return seen[0], passed


@pytest.mark.parametrize(
    ("shown", "secret", "wanted"),
    [
        ([], SECRET, "198.51.100.7"),
        ([b"guess"], SECRET, "198.51.100.7"),
        ([b"guess", SECRET.encode()], SECRET, "198.51.100.7"),
        ([b"\xff\x00"], SECRET, "198.51.100.7"),
        ([b""], "", "198.51.100.7"),
        ([b"guess"], "", "198.51.100.7"),
        ([SECRET.encode()], SECRET, "127.0.0.1"),
    ],
)
async def test_only_who_shows_the_secret_is_believed(shown, secret, wanted):
    client, passed = await asked_by(shown, b"127.0.0.1", secret=secret)
    assert client == wanted
    assert passed == [b"x-forwarded-for"]


async def test_without_keys_the_true_address_counts(tokenizer):
    async with serving(tokenizer, edge_secret=SECRET) as (_, port):
        for proof, address, wanted in [
            (SECRET, "203.0.113.5", 401),
            (SECRET, "127.0.0.1", 200),
            (SECRET, "::1", 200),
            (SECRET, "127.0.0.1, 203.0.113.5", 401),
            ("guess", "203.0.113.5", 200),  # the true one is loopback
        ]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = post(f"content-length: {len(HI)}", f"x-forwarded-for: {address}", f"x-echelon-edge: {proof}")
            writer.write(head + HI)
            assert (await answer(reader))[0] == wanted, (proof, address)
            writer.close()


@pytest.mark.parametrize("name", ["body_seconds", "body_grace_seconds", "body_min_rate", "stalled_seconds"])
def test_limits_must_be_positive(name):
    with pytest.raises(ConfigError, match=name):
        FrontConfig(**{name: 0})


@pytest.mark.parametrize(
    ("path", "wanted"), [("/" + "a" * 8191, 404), ("/" + "a" * 8192, 414), ("/v1?" + "a" * 8192, 414)]
)
async def test_a_url_has_an_end(client, path, wanted):
    r = await client.get(path)
    assert r.status_code == wanted
    assert r.json()["error"]["type"] == "invalid_request_error"


async def test_pages_of_named_origins_may_ask(tokenizer) -> None:
    cors = Cors(("https://app.example",), allow_credentials=True)
    app = create_app(
        FrontConfig(cors=cors), [ServedModel("m", tokenizer, 256)], FakeGenerator(tokenizer), FakeStatus(),
        identity=NoOne(),
    )  # fmt: skip
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        before = await client.options(CHAT, headers={"origin": "https://app.example", **asked})
        assert before.status_code == 200  # without a key: browsers send none with this question
        assert before.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.post(CHAT, content=HI, headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page sees why
        other = await client.options(CHAT, headers={"origin": "https://evil.example", **asked})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


class NoOne:
    """Nobody has a key."""

    def resolve(self, headers, client):
        raise NotAuthorized("no key")
