"""GET /requests/...: from a front to the dispatcher and back, for its owner and for admins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dispatch.fakes import MODEL, Cluster, until

from router.cluster_status import ClusterStatus
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.keys.resolver import KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.remote_stories import RemoteStories

from .test_access import bearer, call

ANNA, BEN, OLGA = (make_key() for _ in range(3))
ASK = {"prompt": [5, 6, 7, 8], "max_tokens": 8, "model": MODEL, "user": "bob"}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster() as running:
        yield running


@pytest.fixture
def app(cluster: Cluster, tokenizer: Any) -> Any:
    owners = ((ANNA, "anna", False), (BEN, "ben", False), (OLGA, "olga", True))
    ring = KeyRing(KeyEntry(digest_of(key.encode()), owner, "Gold", admin=admin) for key, owner, admin in owners)
    return create_app(
        FrontConfig(),
        [ServedModel(MODEL, tokenizer, 256)],
        cluster.sessions,
        ClusterStatus(cluster.client),
        identity=KeyResolver(ring),
        stories=RemoteStories(cluster.client),
    )


async def get(app: Any, key: str, path: str) -> tuple[int, dict[str, Any]]:
    answer = await call(app, [bearer(key)], path=path, method="GET")
    return answer.status, json.loads(answer.body)


async def ask(app: Any, name: str, **more: Any) -> Any:
    headers = [bearer(ANNA), (b"x-request-id", name.encode())]
    return await call(app, headers, path="/v1/completions", body=json.dumps(ASK | more).encode())


async def test_a_request_is_explained_to_its_owner_and_to_admins(app: Any, cluster: Cluster) -> None:
    done = await ask(app, "mine/1", stream=True)
    assert done.status == 200
    for key in (ANNA, OLGA):
        status, told = await get(app, key, "/requests/mine/1/explain")
        assert status == 200
        assert (told["owner"], told["user"], told["tier"], told["outcome"]) == ("anna", "bob", "Gold", "length")
        (lease,) = told["leases"]
        assert {c["replica"] for c in lease["candidates"]} == {"r0", "r1"}
        assert lease["candidates"][0]["replica"] == lease["granted"]["replica"]
        assert lease["end"]["outcome"] == "completed"
        assert (told["prompt_tokens"], told["output_tokens"]) == (4, 8)
        seconds = dict(told["seconds"])
        total = seconds.pop("total")
        assert set(seconds) == {"prepare", "queue", "first_token", "generate", "finish"}
        assert all(part >= 0.0 for part in seconds.values())
        assert sum(seconds.values()) == pytest.approx(total, abs=1e-5)
        assert 0.0 < told["first_token_seconds"] < total
        first = seconds["prepare"] + seconds["queue"] + seconds["first_token"]
        assert told["first_token_seconds"] == pytest.approx(first, abs=1e-5)
        assert await get(app, key, "/requests/mine/1") == (
            200,
            {"id": "mine/1", "state": "ended", "outcome": "length", "tier": "Gold"},
        )


@pytest.mark.parametrize("path", ["/requests/mine", "/requests/mine/explain"])
async def test_others_learn_nothing(app: Any, path: str) -> None:
    await ask(app, "mine")
    status, refused = await get(app, BEN, path)
    assert (status, refused["error"]["code"]) == (404, "request_not_found")
    status, unknown = await get(app, BEN, path.replace("mine", "nope"))
    assert refused["error"]["message"].replace("mine", "nope") == unknown["error"]["message"]
    assert (await call(app, path=path, method="GET")).status == 401


async def test_who_waits_is_told_its_place(app: Any, cluster: Cluster) -> None:
    for engine in cluster.engines:
        cluster.server.drain(engine.id)
    task = asyncio.create_task(ask(app, "patient"))
    await until(lambda: cluster.server.dispatcher.waiting == 1)
    status, told = await get(app, ANNA, "/requests/patient")
    assert (status, told["state"], told["position"]) == (200, "waiting", 1)
    low, middle, high = told["wait_seconds"]
    assert low <= middle <= high
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: cluster.server.dispatcher.waiting == 0)
    status, told = await get(app, ANNA, "/requests/patient/explain")
    assert told["leases"][0]["end"]["outcome"] == "cancelled"


async def test_without_a_dispatcher_it_says_so(app: Any, cluster: Cluster) -> None:
    await cluster.stop_dispatcher()
    status, refused = await get(app, ANNA, "/requests/mine")
    assert (status, refused["error"]["code"]) == (503, "no_replica")
