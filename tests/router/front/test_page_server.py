"""The server before another's API: it hands on what the pages ask for, part by part, and nothing else.

Mutants seen to fail: an answer collected before it is handed on; all headers handed on; other sites let in; /nodes/add
handed on; an upstream connection that outlives its browser.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from router.web.server import page_server

from .openai_server import eventually
from .served import serving


class Upstream:
    """An API server that tells what it was asked, and streams as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.go = asyncio.Event()
        self.gone = False
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request):
        self.seen.append((request.method, request.url.path, dict(request.headers), await request.body()))
        if request.url.path == "/v1/chat/completions":
            return StreamingResponse(self.parts(), media_type="text/event-stream")
        if request.url.path == "/v1/models":
            said = {"retry-after": "3", "x-queue-position": "7", "x-request-id": "r1", "set-cookie": "a=b"}
            return JSONResponse({"error": {"message": "full"}}, 429, headers=said)
        return JSONResponse({"path": request.url.path})

    async def parts(self) -> AsyncIterator[bytes]:
        yield b"data: one\n\n"
        try:
            while not self.go.is_set():  # noqa: ASYNC110 - it is set from another loop
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.gone = True
            raise
        yield b"data: two\n\n"


@pytest.fixture
def upstream():
    return Upstream()


@contextmanager
def pages(upstream):
    with serving(upstream.app) as (host, port), serving(page_server(f"http://{host}:{port}")) as (own, at):
        yield f"http://{own}:{at}"


@asynccontextmanager
async def browser(upstream):
    with pages(upstream) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield client


async def test_streams_are_handed_on_part_by_part(upstream):
    async with (
        browser(upstream) as http,
        http.stream("POST", "/v1/chat/completions", json={"a": 1}, headers={"authorization": "Bearer k"}) as answer,
    ):
        parts = answer.aiter_raw()
        assert await anext(parts) == b"data: one\n\n"  # though the answer has not ended
        upstream.go.set()
        assert b"".join([part async for part in parts]) == b"data: two\n\n"
        assert answer.headers["content-type"].startswith("text/event-stream")
    ((method, path, headers, body),) = upstream.seen
    assert (method, path, json.loads(body)) == ("POST", "/v1/chat/completions", {"a": 1})
    assert headers["authorization"] == "Bearer k"


async def test_a_browser_that_leaves_ends_the_answer_there(upstream):
    async with browser(upstream) as http:
        async with http.stream("POST", "/v1/chat/completions", json={}) as answer:
            assert await anext(answer.aiter_raw()) == b"data: one\n\n"
        await eventually(lambda: upstream.gone)


async def test_status_and_what_a_page_needs_of_the_headers_are_handed_on(upstream):
    async with browser(upstream) as http:
        said = {"cookie": "c=d", "x-request-id": "mine", "x-forwarded-for": "10.0.0.1", "origin": "http://here"}
        answer = await http.get("/v1/models", headers=said)
    assert (answer.status_code, answer.json()) == (429, {"error": {"message": "full"}})
    assert (answer.headers["retry-after"], answer.headers["x-queue-position"]) == ("3", "7")
    assert "set-cookie" not in answer.headers
    headers = upstream.seen[0][2]
    assert headers["x-request-id"] == "mine"
    assert not {"cookie", "origin", "x-forwarded-for"} & headers.keys()


async def test_only_what_pages_ask_for_is_handed_on(upstream):
    good = ("/me", "/cluster", "/requests/a/explain", "/health", "/v1/x..y")
    bad = ("/nodes/add", "/metrics", "/docs", "/v1/../nodes/add", "/v1/%2e%2e/nodes/add", "/healthy", "/v1")
    with pages(upstream) as url:
        host, port = url.removeprefix("http://").split(":")
        for path in (*good, *bad):
            reader, writer = await asyncio.open_connection(host, int(port))  # a client would tidy the path up
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            line = await reader.readline()
            writer.close()
            assert int(line.split()[1]) == (200 if path in good else 404), path
    assert [path for _, path, _, _ in upstream.seen] == list(good)


async def test_pages_of_other_sites_are_refused(upstream):
    async with browser(upstream) as http:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            answer = await http.get("/me", headers={"sec-fetch-site": site})
            assert answer.status_code == status, site
        assert (await http.get("/", follow_redirects=False)).headers["location"] == "/chat"
        assert "Echelon" in (await http.get("/chat")).text


async def test_a_server_that_is_away_is_told_as_such():
    with serving(page_server("http://127.0.0.1:1")) as (host, port):
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
            answer = await http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "server_away")
    assert answer.headers["retry-after"] == "1"
