"""`Idempotency-Key` over HTTP: the same bytes again, charged once."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import count

import httpx
import pytest

from router.dispatch.answers import KeptAnswers
from router.dispatch.lease import Claim, Keep, Verdict
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.http.once import REPLAYED
from router.metrics import Metrics
from router.protocol.errors import HttpRefusal
from workers.api.errors import Overloaded

from .fakes import FakeGenerator, FakeStatus

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
KEY = {"idempotency-key": "k-1"}


class LocalAnswers:
    """The dispatcher's table of answers, in process."""

    def __init__(self):
        self.table = KeptAnswers(time.monotonic, grace=5.0)
        self.numbers, self.waiting = count(1), {}

    def hand_out(self, told):
        for _, claimed in told:
            self.waiting.pop(claimed.number).set_result(claimed)

    async def claim(self, key, body, *, wait):
        number = next(self.numbers)
        answer = self.waiting[number] = asyncio.get_running_loop().create_future()
        self.hand_out(self.table.claim("front", Claim(number, key, body, wait)))
        claimed = await answer
        if claimed.verdict is Verdict.RUNNING:
            raise HttpRefusal(409, "running", code="idempotency_key_in_use")
        if claimed.verdict is Verdict.OTHER_BODY:
            raise HttpRefusal(422, "another body", code="idempotency_key_reused")
        return claimed.answer or None

    def keep(self, key, body, answer):
        self.hand_out(self.table.keep("front", Keep(key, body, answer)))


class Owners:
    """The owner is what the Authorization header says."""

    def resolve(self, headers, client):
        return Identity(headers.get("authorization", "default"))


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
async def answers():
    made = LocalAnswers()
    yield made
    assert not made.waiting
    assert not made.table._running  # no claim is left behind


@pytest.fixture
async def client(tokenizer, generator, metrics, answers):
    app = create_app(
        FrontConfig(),
        [ServedModel("m", tokenizer, 256)],
        generator,
        FakeStatus(),
        identity=Owners(),
        metrics=metrics,
        answers=answers,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=30) as c:
        yield c


def ran(generator: FakeGenerator) -> int:
    return len(generator.requests)


async def running(generator: FakeGenerator) -> None:
    while not generator.running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_retry_gets_the_same_bytes_and_runs_nothing(client, generator, metrics):
    first = await client.post(CHAT, json=BODY, headers=KEY)
    again = await client.post(CHAT, json=BODY, headers=KEY)
    assert (first.status_code, again.status_code, ran(generator)) == (200, 200, 1)
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    (name, value), *_ = REPLAYED.items()
    assert (name not in first.headers, again.headers[name]) == (True, value)
    assert metrics.registry.get_sample_value("vllm:generation_tokens_total", {"model_name": "m"}) == 5
    assert metrics.registry.get_sample_value("echelon_requests_total", {"tier": "", "outcome": "kept"}) == 1


async def test_duplicates_at_once_wait_for_the_first(client, generator):
    generator.pause = 0.01
    all_of_them = await asyncio.gather(*(client.post(CHAT, json=BODY, headers=KEY) for _ in range(5)))
    assert {r.status_code for r in all_of_them} == {200}
    assert len({r.content for r in all_of_them}) == 1
    assert ran(generator) == 1


async def test_keys_are_of_an_owner_and_a_route(client, generator):
    prompt = {"model": "m", "prompt": "hi", "max_tokens": 5}
    for headers in (KEY, KEY | {"authorization": "anna"}):
        assert (await client.post(CHAT, json=BODY, headers=headers)).status_code == 200
        assert (await client.post("/v1/completions", json=prompt, headers=headers)).status_code == 200
    assert ran(generator) == 4


async def test_another_body_is_refused(client, generator, metrics):
    assert (await client.post(CHAT, json=BODY, headers=KEY)).status_code == 200
    for other in (BODY | {"max_tokens": 6}, BODY | {"stream": True}):
        r = await client.post(CHAT, json=other, headers=KEY)
        assert (r.status_code, r.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert ran(generator) == 1
    assert metrics.registry.get_sample_value("echelon_refusals_total", {"reason": "idempotency_key_reused"}) == 2


async def test_errors_are_not_kept(client, generator):
    generator.refusal = Overloaded("full")
    assert (await client.post(CHAT, json=BODY, headers=KEY)).status_code == 429
    generator.refusal, generator.failure = None, RuntimeError("broken")
    assert (await client.post(CHAT, json=BODY, headers=KEY)).status_code == 500
    generator.failure = None
    assert (await client.post(CHAT, json=BODY | {"n": -1}, headers=KEY)).status_code == 400
    assert (await client.post(CHAT, json=BODY, headers=KEY)).status_code == 200


async def test_a_failure_makes_one_of_those_that_wait_first(client, generator):
    generator.pause, generator.failure, generator.fail_after = 0.01, RuntimeError("broken"), 3

    async def ask():
        r = await client.post(CHAT, json=BODY, headers=KEY)
        generator.failure = None
        return r

    statuses = [r.status_code for r in await asyncio.gather(*(ask() for _ in range(4)))]
    assert sorted(statuses) == [200, 200, 200, 500]
    assert ran(generator) == 2


@pytest.mark.parametrize("value", ["", "a b", "ä".encode(), "x" * 256])
async def test_a_strange_key_is_refused(client, generator, value):
    r = await client.post(CHAT, json=BODY, headers={"idempotency-key": value})
    assert (r.status_code, ran(generator)) == (400, 0)
    assert "Idempotency-Key" in r.json()["error"]["message"]


async def test_a_stream_holds_its_key_while_it_runs(client, generator):
    generator.pause = 0.01
    body = BODY | {"stream": True}
    first = asyncio.create_task(client.post(CHAT, json=body, headers=KEY))
    await running(generator)
    r = await client.post(CHAT, json=body, headers=KEY)
    assert (r.status_code, r.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    assert (await first).text.endswith("data: [DONE]\n\n")
    assert (await client.post(CHAT, json=body, headers=KEY)).text.endswith("data: [DONE]\n\n")
    assert ran(generator) == 2


@pytest.mark.parametrize("leave", ["disconnect", "cancel"])
async def test_a_keyed_request_outlives_its_connection(client, generator, leave):
    """Its client went away in the middle, and comes back for the answer."""
    generator.pause = 0.01
    gone = asyncio.Event()
    body = json.dumps(BODY).encode()
    sent = []

    async def receive():
        if not sent:
            sent.append(None)
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    headers = [(b"content-type", b"application/json"), (b"idempotency-key", b"k-1")]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("front", 80),
    }  # fmt: skip
    call = asyncio.create_task(client._transport.app(scope, receive, send))
    await running(generator)
    gone.set()
    if leave == "cancel":
        call.cancel()
    r = await client.post(CHAT, content=body, headers={"content-type": "application/json", **KEY})
    assert r.status_code == 200, r.text
    assert (ran(generator), r.headers["idempotent-replayed"]) == (1, "true")
    await asyncio.gather(call, return_exceptions=True)


async def test_without_a_key_every_request_runs(client, generator):
    for _ in range(2):
        assert (await client.post(CHAT, json=BODY)).status_code == 200
    assert ran(generator) == 2
