"""Foreign OpenAI-compatible servers as nodes: added, watched, dispatched to, and their answers passed on as they are.

`test_fault_proxy_*`: faults of LMDeploy's proxy that are of its nodes; the others are in
`tests/router/dispatch/test_fault_proxy.py`.

Mutants seen to fail: one miss is enough; no patience with a probe; 200 for what the node refused; a second try after
the first byte; no settlement of a relayed lease; the client's key handed on; no `foreign` in `_fits`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from router.dispatch.client import DispatcherClient
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.lease import Acquire, Granted
from router.dispatch.server import DispatcherServer
from router.foreign.node import NodeSpec
from router.foreign.upstream import Deadlines, checked_url
from router.foreign.watch import ForeignNodes
from router.http import relay
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.metrics import Metrics
from workers.api.errors import ConfigError, NodeFailed

from .fakes import FakeGenerator, FakeStatus
from .openai_server import OpenAIServer, eventually

CHAT = "/v1/chat/completions"
SECRET = "s3cret"


def body(model="theirs", **rest):
    return {"model": model, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 20, **rest}


class Keys:
    """The key says who asks, and whether it is an admin."""

    def resolve(self, headers, client):
        key = headers.get("authorization", "Bearer anna").removeprefix("Bearer ")
        return Identity(key, models=frozenset({"m"}) if key == "narrow" else None, admin=key == "root")


@dataclass
class Front:
    http: httpx.AsyncClient
    server: DispatcherServer
    client: DispatcherClient
    generator: FakeGenerator
    metrics: Metrics

    async def add(self, node, **status):
        answer = await self.http.post("/nodes/add", json={"url": node.url, "status": status or None}, headers=ROOT)
        await eventually(lambda: any(r.info.url == node.url for r in self.client.rows) or answer.status_code != 200)
        return answer

    async def check(self):
        """Every lease has ended, and the books balance."""
        await eventually(lambda: self.server.ledger().held == 0)
        assert self.server.ledger().balanced


ROOT = {"authorization": "Bearer root"}


@asynccontextmanager
async def front(tokenizer, monkeypatch, *, own=(), config=None, every=0.02, patience=1.0, idle=5.0):
    server = DispatcherServer(config or DispatcherConfig(replica_grace=0.1, exclusion_grace=0.1), secret=SECRET)
    server.nodes = ForeignNodes(server, every=every, patience=patience)
    address = await server.start()

    async def locate():
        return address

    client = DispatcherClient("front-1", secret=SECRET, locate=locate)
    client.start()
    await eventually(lambda: client.connected)
    monkeypatch.setattr(relay, "Deadlines", lambda: Deadlines(1.0, 5.0, idle))
    generator = FakeGenerator(tokenizer)
    models = [ServedModel(name, tokenizer, 256) for name in own]
    metrics = Metrics()
    app = create_app(FrontConfig(), models, generator, FakeStatus(), identity=Keys(), nodes=client, metrics=metrics)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=30) as http:
            yield Front(http, server, client, generator, metrics)
    finally:
        await client.close()
        await server.close()


@pytest.fixture
async def site(tokenizer, monkeypatch):
    async with front(tokenizer, monkeypatch) as f, OpenAIServer() as node:
        yield f, node
        await f.check()


async def test_a_node_is_added_listed_served_and_removed(site):
    f, node = site
    assert (await f.add(node)).status_code == 200
    listed = (await f.http.get("/v1/models")).json()["data"]
    assert [m["id"] for m in listed] == ["theirs"]
    status = (await f.http.get("/nodes/status", headers=ROOT)).json()
    assert status[node.url]["models"] == ["theirs"]
    assert (status[node.url]["state"], status[node.url]["unfinished"]) == ("ready", 0)
    answer = await f.http.post(CHAT, json=body())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "xxxx"
    assert (await f.http.post("/nodes/remove", params={"node_url": node.url}, headers=ROOT)).status_code == 200
    await eventually(lambda: not f.client.rows)
    assert (await f.http.post("/nodes/remove", json={"url": node.url}, headers=ROOT)).status_code == 404
    assert (await f.http.post(CHAT, json=body())).status_code == 404


async def test_what_the_client_sent_arrives_as_it_was_but_for_its_key(site):
    f, node = site
    node.needs_key = "their-key"
    add = {"url": node.url + "/v1/", "key": "their-key"}
    assert (await f.http.post("/nodes/add", json=add, headers=ROOT)).status_code == 200
    await eventually(lambda: f.client.rows)
    sent = json.dumps(body(temperature=0.25, their_own_option=[1, {"a": None}])).encode()
    answer = await f.http.post(CHAT, content=sent, headers={"authorization": "Bearer anna"})
    assert answer.status_code == 200, answer.text
    path, headers, got = node.seen[0]
    assert (path, got, headers["authorization"]) == (CHAT, sent, "Bearer their-key")
    assert "anna" not in str(headers)
    assert "their-key" not in (await f.http.get("/nodes/status", headers=ROOT)).text


async def test_streams_pass_through_and_are_counted(site):
    f, node = site
    await f.add(node)
    for options in ({}, {"include_usage": True}):
        answer = await f.http.post(CHAT, json=body(stream=True, stream_options=options))
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.strip().split("\n\n")
        assert [json.loads(e[6:])["choices"][0]["delta"]["content"] for e in events[:4]] == ["t0", "t1", "t2", "t3"]
        assert events[-1] == "data: [DONE]"
        await f.check()
    tokens = {s.labels["kind"]: s.value for s in samples(f, "echelon_user_tokens_total")}
    assert tokens["generation"] == 8


def samples(f, name):
    return [s for family in f.metrics.registry.collect() for s in family.samples if s.name == name]


async def test_only_admins_touch_nodes(site):
    f, node = site
    for method, path, sent in (
        ("GET", "/nodes/status", None),
        ("POST", "/nodes/add", {"url": node.url}),
        ("POST", "/nodes/remove", {"url": node.url}),
    ):
        answer = await f.http.request(method, path, json=sent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only")
    assert node.probes == 0


async def test_a_key_sees_no_node_whose_model_it_may_not_use(site):
    f, node = site
    await f.add(node)
    narrow = {"authorization": "Bearer narrow"}
    assert (await f.http.get("/v1/models", headers=narrow)).json()["data"] == []
    assert (await f.http.post(CHAT, json=body(), headers=narrow)).status_code == 404
    assert not node.seen


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "http://",
        "http://h?x=1",
        "http://u:p@h",
        "file:///etc/passwd",
        "http://h:99999",
        "http://hö",
        "h:80",
    ],
)
async def test_strange_urls_are_refused(site, url):
    f, _ = site
    answer = await f.http.post("/nodes/add", json={"url": url}, headers=ROOT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")


def test_urls_of_one_server_are_one():
    assert {checked_url(u) for u in ("http://h:80", "http://h:80/", "http://h:80/v1", "http://h:80/v1/")} == {
        "http://h:80"
    }
    assert checked_url("https://[::1]:8443/base/v1") == "https://[::1]:8443/base"
    with pytest.raises(ConfigError):
        checked_url("http://h/#x")


async def test_fault_proxy_a_probe_has_a_timeout(tokenizer, monkeypatch):
    async with front(tokenizer, monkeypatch, patience=0.1) as f, OpenAIServer(mode="hang") as node:
        answer = await f.http.post("/nodes/add", json={"url": node.url}, headers=ROOT)
        assert answer.status_code == 502
        assert "models within 0.1 s" in answer.json()["error"]["message"]
        assert not f.client.rows


async def test_fault_proxy_one_miss_removes_nobody_and_a_node_that_is_back_is_taken_back():
    """Three misses in a row, then two hits in a row, and nothing less, change what is told."""
    told: list[list[bool]] = []  # by probe

    class Table:
        def node_up(self, info, speed):
            pass

        def node_health(self, replica_id, *, well):
            told[-1].append(well)

        def node_down(self, replica_id, reason):
            raise AssertionError("nobody removed it")

    async def outcome(spec):
        if len(told) == len(outcomes):
            over.set()
            await asyncio.sleep(3600)
        told.append([])
        if not outcomes[len(told) - 1]:
            raise NodeFailed("is away")
        return ("theirs",)

    over = asyncio.Event()
    nodes = ForeignNodes(Table(), every=0.0)
    nodes._probe = outcome
    outcomes = [True, False, False, True, False, False, False, True, False, True, True]
    await nodes.add(NodeSpec("http://n"))
    await over.wait()
    await nodes.close()
    assert told == [[True], [], [], [True], [], [], [False], [False], [False], [False], [True]]


async def test_a_node_that_stays_away_gets_no_requests_and_is_in_the_table(tokenizer, monkeypatch):
    async with front(tokenizer, monkeypatch, patience=0.2) as f, OpenAIServer() as node:
        await f.add(node)
        await node.shut()
        await eventually(lambda: f.client.rows[0].state == "suspect")
        async with asyncio.timeout(20):
            answer = await f.http.post(CHAT, json=body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
        assert "no replica of theirs came up" in answer.json()["error"]["message"]
        await node.open(node.port)
        await eventually(lambda: f.client.rows[0].state == "ready")
        assert (await f.http.post(CHAT, json=body())).status_code == 200
        await f.check()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_fault_proxy_a_failure_keeps_its_status_and_its_words(site, status, stream):
    f, node = site
    await f.add(node)
    node.mode, node.status = "status", status
    answer = await f.http.post(CHAT, json=body(stream=stream))
    assert (answer.status_code, answer.content) == (status, node.error)
    assert answer.headers["retry-after"] == "7"
    assert len(node.seen) == 1


async def test_another_node_is_tried_before_the_first_byte_only(tokenizer, monkeypatch):
    async with front(tokenizer, monkeypatch, every=60.0) as f, OpenAIServer() as bad, OpenAIServer() as good:
        await f.add(bad, speed=1e6)
        await f.add(good, speed=1.0)
        bad.mode = "cut_before"
        answer = await f.http.post(CHAT, json=body())
        assert answer.status_code == 200
        assert (len(bad.seen), len(good.seen)) == (1, 1)
        await f.check()


@pytest.mark.parametrize("mode", ["cut_within", "no_done"])
async def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_tried_again(site, mode):
    f, node = site
    await f.add(node)
    node.mode = mode
    answer = await f.http.post(CHAT, json=body(stream=True))
    events = answer.text.strip().split("\n\n")
    assert json.loads(events[0][6:])["choices"][0]["delta"]["content"] == "t0"
    assert json.loads(events[-1][6:])["error"]["code"] == "node_failed"
    assert "data: [DONE]" not in answer.text
    assert len(node.seen) == 1


async def test_half_an_answer_is_none(site):
    f, node = site
    await f.add(node)
    node.mode = "half_json"
    answer = await f.http.post(CHAT, json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "node_failed")
    assert len(node.seen) == 1


async def test_a_client_that_leaves_takes_its_request_along(site):
    f, node = site
    await f.add(node)
    node.mode = "hang"
    asking = asyncio.create_task(f.http.post(CHAT, json=body()))
    await eventually(lambda: f.server.ledger().held == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await f.check()


async def test_own_replicas_and_nodes_share_a_model_and_own_ones_alone_get_token_requests(tokenizer, monkeypatch):
    async with front(tokenizer, monkeypatch, own=["m"]) as f, OpenAIServer(models=["m"]) as node:
        await f.add(node)
        assert (await f.http.post(CHAT, json=body("m"))).json()["choices"][0]["message"]["content"] == "xxxx"
        assert (await f.http.get("/v1/models")).json()["data"][0]["owned_by"] == "echelon"
        tokens_only = Acquire("t", "m", 10, 10)
        answer = f.server.dispatcher.acquire("front-1", tokens_only)
        assert answer is not None
        assert "foreign nodes alone" in answer.message
        f.server.dispatcher.replica_up(own_replica(), speed=1e9)
        granted = f.server.dispatcher.acquire("front-1", Acquire("u", "m", 10, 10, foreign=True))
        assert isinstance(granted, Granted)
        assert granted.replica.id == "ours"
        f.server.dispatcher.cancel("u")
        mixed = await f.http.post(CHAT, json=body("m"))
        assert mixed.json()["choices"][0]["message"]["content"] != "xxxx"
        assert f.generator.requests[-1].handover.granted.replica.id == "ours"
        await f.check()


def own_replica():
    from workers.api.replica import ReplicaInfo

    return ReplicaInfo("ours", "m", "h", 1, 4096, 8, num_blocks=1000, block_size=16)


async def test_nodes_of_the_configuration_are_there_when_they_come_up(tokenizer, monkeypatch):
    async with OpenAIServer() as node:
        config = DispatcherConfig(nodes=(NodeSpec(node.url),))
        async with front(tokenizer, monkeypatch, config=config) as f:
            await eventually(lambda: [r.info.url for r in f.client.rows] == [node.url])
            assert (await f.http.post(CHAT, json=body())).status_code == 200
