"""What goes wrong behind the front, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.http.app import create_app
from router.http.choice import Choice
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity, NoKeys
from workers.api.errors import (
    ConfigError,
    EngineFault,
    InvalidRequest,
    NoReplica,
    NotAuthorized,
    Overloaded,
    ReplicaLost,
)
from workers.api.request import Delta, FinishReason

from .fakes import ANSWER, FakeGenerator, FakeStatus, all_routes
from .test_json_entry import hostile_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

REFUSALS = [
    (Overloaded("The queue is full.", retry_after=2.3), 429, "rate_limit_exceeded", "3"),
    (NoReplica("No replica of m is ready.", retry_after=0.1), 503, "no_replica", "1"),
    (ReplicaLost("gone"), 503, "replica_lost", "1"),
    (InvalidRequest("too long", param="messages", code="x"), 400, "x", None),
    (EngineFault("rank 0: bad step"), 500, "engine_fault", None),
    (RuntimeError("secret detail"), 500, None, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "wanted", "code", "after"), REFUSALS, ids=lambda v: type(v).__name__)
async def test_refused_before_the_first_batch(client, generator, error, wanted, code, after, stream):
    generator.refusal = error
    r = await client.post(CHAT, json=HI | {"stream": stream})
    assert (r.status_code, r.json()["error"]["code"]) == (wanted, code)
    assert r.headers.get("retry-after") == after
    assert r.headers["x-request-id"]
    assert "secret" not in r.text


@pytest.mark.parametrize("error", [ReplicaLost("gave up"), EngineFault("rank 1: bad"), RuntimeError("secret detail")])
@pytest.mark.parametrize("prompts", [1, 2])
async def test_a_stream_that_fails_says_so(client, generator, error, prompts):
    generator.failure, generator.fail_after = error, 20
    r = await client.post(COMPLETION, json={"model": "m", "prompt": ["x"] * prompts, "stream": True, "max_tokens": 50})
    assert r.status_code == 200
    last = r.text.rstrip("\n").split("\n\n")[-1]
    shown = json.loads(last.removeprefix("data: "))
    assert set(shown) == {"error"}
    assert "[DONE]" not in r.text
    assert "secret" not in r.text
    assert '"finish_reason":"' not in r.text
    assert (generator.running, generator.closed) == (0, prompts)
    whole = await client.post(COMPLETION, json={"model": "m", "prompt": ["x"] * prompts, "max_tokens": 50})
    assert whole.status_code == (503 if isinstance(error, ReplicaLost) else 500)
    assert generator.running == 0


@pytest.mark.parametrize("fault", ["error_delta", "drop_finish"])
async def test_an_unfinished_answer_is_no_success(client, generator, fault):
    setattr(generator, fault, True)
    r = await client.post(CHAT, json=HI | {"stream": True})
    assert '"error":' in r.text
    assert "[DONE]" not in r.text
    assert (await client.post(CHAT, json=HI)).status_code == 500
    assert generator.running == 0


@pytest.mark.parametrize("delta", [Delta("r", 1, (40,)), Delta("r", 0, (), finish=FinishReason.ABORT)])
def test_gaps_and_aborts_are_faults(tokenizer, delta):
    with pytest.raises(EngineFault):
        Choice(0, tokenizer.detokenizer()).push(delta)


def leaving_scope(path=CHAT):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }


async def leave(app, body, path, after_bodies):
    """Send `body`, go away once that many body messages came (0: before any answer)."""
    enough = asyncio.Event()
    count = 0
    if not after_bodies:
        asyncio.get_running_loop().call_later(0.02, enough.set)
    sent_body = False

    async def receive():
        nonlocal sent_body
        if not sent_body:
            sent_body = True
            return {"type": "http.request", "body": json.dumps(body).encode()}
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal count
        count += message["type"] == "http.response.body"
        if count >= after_bodies > 0:
            enough.set()
        await asyncio.sleep(0)

    await app(leaving_scope(path), receive, send)
    return count


@pytest.mark.parametrize(
    ("path", "body", "after"),
    [
        (CHAT, HI | {"stream": True}, 3),
        (CHAT, HI | {"stream": True, "n": 4}, 2),
        (CHAT, HI, 0),
        (COMPLETION, {"model": "m", "prompt": ["a", "b"], "stream": True, "max_tokens": 200}, 3),
        (COMPLETION, {"model": "m", "prompt": ["a", "b"], "max_tokens": 200}, 0),
    ],
)
async def test_a_client_that_leaves_closes_the_generator(app, generator, path, body, after):
    generator.endless, generator.pause = True, 0.002
    before = asyncio.all_tasks()
    steps = await leave(app, body, path, after)
    assert (generator.running, generator.closed) == (0, len(generator.requests))
    assert generator.requests
    assert steps < 30
    assert asyncio.all_tasks() == before
    page = (await call_metrics(app)).text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="m"} 1.0' in page
    assert 'echelon_front_requests{model_name="m"} 0.0' in page


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_reads_nothing_closes_the_generator(tokenizer, stream):
    generator = FakeGenerator(tokenizer)
    generator.endless, generator.pause = stream, 0.001
    app = create_app(FrontConfig(stalled_seconds=0.05), [ServedModel("m", tokenizer, 256)], generator, FakeStatus())

    async def receive():
        return {"type": "http.request", "body": json.dumps(HI | {"stream": stream}).encode()}

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with asyncio.timeout(10):
        await app(leaving_scope(CHAT), once(receive), send)
    assert (generator.running, generator.closed) == (0, len(generator.requests))
    assert generator.requests
    assert 'echelon_front_requests{model_name="m"} 0.0' in (await call_metrics(app)).text


def once(receive):
    """`receive`, and then nothing more: the client is there but silent."""
    asked = False

    async def silent():
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return await receive()

    return silent


async def call_metrics(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as c:
        return await c.get("/metrics")


async def test_a_client_that_leaves_while_it_waits(tokenizer):
    """Nothing came yet: the wait for the first batch is cut."""

    class Waiting(FakeGenerator):
        async def generate(self, request, sink):
            self.running += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.running -= 1
                self.closed += 1

    generator = Waiting(tokenizer)
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, FakeStatus())
    assert await leave(app, HI | {"stream": True}, CHAT, 0) == 0
    assert (generator.running, generator.closed) == (0, 1)


async def test_identity(tokenizer):
    """The resolver decides for every route but health; owner, tier and salt reach the generator."""

    class Keys:
        def resolve(self, headers, client):
            if headers.get("authorization") != "Bearer good":
                raise NotAuthorized("No key.")
            return Identity("anna", "gold", b"salt")

    generator = FakeGenerator(tokenizer)
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, FakeStatus(), identity=Keys())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as c:
        for route in all_routes(app.routes):
            for method in route.methods or ():
                r = await c.request(method, re.sub(r"\{.*?\}", "m", route.path), json=HI)
                if route.path.startswith("/health"):
                    assert r.status_code == 200, route.path
                else:
                    assert r.status_code == 401, route.path
                    kind = "authentication_error" if route.path.startswith("/v1/messages") else "invalid_request_error"
                    assert method == "HEAD" or r.json()["error"]["type"] == kind
                assert r.headers["x-request-id"]
        assert not generator.requests
        assert (await c.post(CHAT, json=HI, headers={"authorization": "Bearer good"})).status_code == 200
    seen = generator.requests[0]
    assert (seen.owner, seen.tier, seen.salt, seen.route) == ("anna", "gold", b"salt", CHAT)


@pytest.mark.parametrize(
    ("client", "fine"),
    [("127.0.0.1", True), ("::1", True), (None, True), ("10.0.0.1", False), ("fe80::1%eth0", False), ("x", False)],
)
async def test_without_keys_only_loopback(client, fine):
    from starlette.datastructures import Headers

    if fine:
        assert NoKeys().resolve(Headers(), client).owner == "default"
    else:
        with pytest.raises(NotAuthorized):
            NoKeys().resolve(Headers(), client)
        assert NoKeys(loopback_only=False).resolve(Headers(), client).owner == "default"


async def test_a_body_that_grows_is_cut(app):
    """No Content-Length: the cap holds while the body comes, and a lying length is refused."""
    fed = 0

    async def endless():
        nonlocal fed
        while True:
            fed += 1
            yield b" " * (1 << 20)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as c:
        r = await c.post(CHAT, content=endless(), headers={"content-type": "application/json"})
        assert r.status_code == 413
        assert fed < 20
        r = await c.post(CHAT, content=b"{}", headers={"content-type": "application/json", "content-length": "9" * 30})
        assert r.status_code == 413


def test_configs_are_checked(tokenizer):
    with pytest.raises(ConfigError):
        FrontConfig(text_threads=0)
    with pytest.raises(ConfigError):
        ServedModel("", tokenizer, 256)
    twice = [ServedModel("m", tokenizer, 256)] * 2
    with pytest.raises(ConfigError, match="share a name"):
        create_app(FrontConfig(), twice, FakeGenerator(tokenizer), FakeStatus())


def test_hostile_bodies_over_http(tokenizer):
    """No answer is a 5xx, every refusal is OpenAI's, and nothing stays behind."""
    generator = FakeGenerator(tokenizer, answer="ok")
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, FakeStatus())
    good = json.dumps(HI).encode()
    mangled = st.builds(lambda at, by: good[:at] + by + good[at + len(by) :], st.integers(0, len(good)), st.binary())
    bodies = hostile_body().map(lambda b: json.dumps(b).encode("utf-8", "surrogatepass")) | mangled

    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")

        @given(bodies, st.sampled_from([CHAT, COMPLETION]))
        @settings(max_examples=150, deadline=None)
        def attack(raw, path):
            r = runner.run(client.post(path, content=raw, headers={"content-type": "application/json"}))
            assert r.status_code < 500, r.text
            if r.status_code != 200:
                assert r.json()["error"]["type"] == "invalid_request_error"
            assert generator.running == 0

        attack()
        assert runner.run(client.post(CHAT, json=HI)).json()["choices"][0]["message"]["content"] == "ok"
        runner.run(client.aclose())


def test_answer_is_not_trivial(tokenizer):
    """The fake's answer has characters of 1 to 4 bytes, or the tests above would prove little."""
    assert {len(c.encode()) for c in ANSWER} == {1, 2, 3, 4}
    assert len(tokenizer.encode(ANSWER)) > len(ANSWER) / 2


async def test_a_refusal_shows_place_and_wait(tokenizer):
    error = Overloaded("full", retry_after=2.0)
    error.position, error.wait = 31, (1.0, 2.25, 7.0)
    generator = FakeGenerator(tokenizer, refusal=error)
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, FakeStatus())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as c:
        r = await c.post(CHAT, json=HI)
    assert r.status_code == 429
    shown = {name: r.headers[name] for name in ("retry-after", "x-queue-position", "x-queue-wait-seconds")}
    assert shown == {"retry-after": "2", "x-queue-position": "31", "x-queue-wait-seconds": "1.0 2.2 7.0"}
