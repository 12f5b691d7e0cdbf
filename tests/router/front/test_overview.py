"""GET /me and GET /cluster: from a front to the dispatcher and back, with and without tiers.

Mutants seen to fail: /cluster for everybody; the key's tier instead of the file's; other owners' requests counted;
requests that have ended still served; users of a slice left out, or counted twice.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from dispatch.fakes import MODEL, Cluster, generation, until

from router.cluster_status import ClusterStatus
from router.dispatch.activity import MOST_SERVED, MOST_USERS, SLICE
from router.dispatch.dispatcher import DispatcherConfig
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.keys.resolver import KeyResolver
from router.keys.ring import KeyEntry, KeyRing, digest_of, make_key
from router.qos.config import Account, QosConfig, Tier
from router.remote_stories import RemoteStories
from router.slices import at_once

from .test_access import bearer, call

ANNA, BEN, OLGA = (make_key() for _ in range(3))
GOLD, BRONZE = Tier(0, "Gold"), Tier(1, "Bronze")
TIERS = QosConfig(
    (GOLD, BRONZE), (Account(GOLD, "anna", 60.0), Account(BRONZE, "default", 0.0), Account(GOLD, "default", 40.0))
)


class Ranks:
    """Where ranks are."""

    def ranks(self) -> dict[str, list[str]]:
        return {"r0": ["10.0.0.1", "10.0.0.2"]}


def app_of(cluster: Cluster, tokenizer: Any) -> Any:
    owners = ((ANNA, "anna", False), (BEN, "ben", False), (OLGA, "olga", True))
    ring = KeyRing(KeyEntry(digest_of(key.encode()), owner, "Bronze", admin=admin) for key, owner, admin in owners)
    return create_app(
        FrontConfig(),
        [ServedModel(MODEL, tokenizer, 256)],
        cluster.sessions,
        ClusterStatus(cluster.client),
        identity=KeyResolver(ring),
        stories=RemoteStories(cluster.client),
        nodes=cluster.client,
        places=Ranks(),
    )


def tiered(qos: QosConfig | None) -> Cluster:
    """Its engines may stand still for as long as a test looks."""
    return Cluster(config=DispatcherConfig(canary_every=math.inf, suspect_after=math.inf, qos=qos))


async def get(app: Any, key: str, path: str) -> Any:
    answer = await call(app, [bearer(key)], path=path, method="GET")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


async def ask(app: Any, key: str, name: str, **more: Any) -> Any:
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 8, "model": MODEL, **more}
    headers = [bearer(key), (b"x-request-id", name.encode())]
    return await call(app, headers, path="/v1/completions", body=json.dumps(body).encode())


async def test_an_operator_sees_who_waits_and_who_is_served_and_why(tokenizer):
    async with tiered(TIERS) as cluster:
        app = app_of(cluster, tokenizer)
        for engine in cluster.engines:
            engine.hold = True
        names = [f"anna-{n}" for n in range(10)] + [f"ben-{n}" for n in range(10)]
        asked = [asyncio.create_task(ask(app, ANNA if n.startswith("a") else BEN, n)) for n in names]
        await until(lambda: cluster.server.dispatcher.waiting == 4 and len(cluster.client.rows) == 2)
        await until(lambda: sum(row.leases for row in cluster.client.rows) == 16)
        seen = await get(app, OLGA, "/cluster")
        assert seen["connected"]
        assert {r["id"]: (r["state"], r["ranks"]) for r in seen["replicas"]} == {
            "r0": ("ready", ["10.0.0.1", "10.0.0.2"]),
            "r1": ("ready", []),
        }
        assert [t["tier"] for t in seen["tiers"]] == ["Gold", "Bronze"]
        activity = seen["activity"]
        users = {u["user"]: (u["tier"], u["quota"], u["waiting"] + u["running"]) for u in activity["users"]}
        assert users == {"anna": ("Gold", 60.0, 10), "ben": ("Bronze", 0.0, 10)}
        assert [u["user"] for u in activity["users"]] == ["anna", "ben"], "the higher tier first"
        assert sum(u["waiting"] for u in activity["users"]) == 4
        served = activity["served"]
        assert len(served) == 16
        assert {s["id"] for s in served} <= set(names)
        for one in served:
            others = {"r0", "r1"} - {one["replica"]}
            assert one["expected_seconds"] > 0.0
            assert one["next_best"] in others or set(one["kept_out"]) == others
        waits = activity["waiting"]
        assert {w["owner"] for w in waits} == {u["user"] for u in activity["users"] if u["waiting"]}

        anna, ben = await get(app, ANNA, "/me"), await get(app, BEN, "/me")
        assert (anna["owner"], anna["admin"], anna["models"][MODEL]["tier"]) == ("anna", False, "Gold")
        mine = ben["models"][MODEL]
        assert (mine["tier"], mine["account"], mine["waiting"] + mine["running"]) == ("Bronze", "default", 10)
        for key in (ANNA, BEN):
            refused = await call(app, [bearer(key)], path="/cluster", method="GET")
            assert (refused.status, refused.error["code"]) == (403, "admin_only")

        for engine in cluster.engines:
            engine.hold = False
        assert [a.status for a in await asyncio.gather(*asked)] == [200] * 20
        await until(lambda: cluster.server.ledger().held == 0)
        done = at_once(cluster.server.dispatcher.activity())
        assert (done["served"], done["waiting"], done["users"]) == ([], [], [])
        assert {e["outcome"] for e in done["ended"]} == {"length"}
        assert all(e["first_token_seconds"] > 0 and e["output_tokens"] == 8 and e["ago"] >= 0 for e in done["ended"])
        assert cluster.server.ledger().balanced


async def test_without_tiers_all_are_counted_by_owner_and_nothing_grows_without_end(tokenizer):
    async with tiered(None) as cluster:
        app = app_of(cluster, tokenizer)
        for engine in cluster.engines:
            engine.hold = True
            engine.slots = 64
        requests = [generation(f"g{n}.x", max_tokens=4) for n in range(MOST_SERVED + 30)]
        running = [asyncio.create_task(cluster.sessions.generate(r, lambda batch: True)) for r in requests]
        await until(lambda: at_once(cluster.server.dispatcher.activity())["waiting"] != [])
        seen = (await get(app, OLGA, "/cluster"))["activity"]
        assert len(seen["served"]) + seen["more_served"] == 16
        assert len(seen["waiting"]) == 12
        assert [(u["user"], u["tier"], u["quota"]) for u in seen["users"]] == [("default", "", None)]
        for engine in cluster.engines:
            engine.hold = False
        await asyncio.gather(*running)
        assert cluster.server.ledger().balanced


async def test_without_a_dispatcher_the_pages_show_what_is_known(tokenizer):
    async with tiered(TIERS) as cluster:
        app = app_of(cluster, tokenizer)
        await until(lambda: len(cluster.client.rows) == 2)
        await cluster.stop_dispatcher()
        seen = await get(app, OLGA, "/cluster")
        assert (seen["connected"], seen["activity"], len(seen["replicas"])) == (False, {}, 2)
        me = await get(app, ANNA, "/me")
        assert me["models"][MODEL] == {"tier": "Bronze", "account": "", "waiting": 0, "running": 0}


@pytest.mark.parametrize("qos", [TIERS, None], ids=["tiers", "none"])
async def test_many_users_are_counted_in_slices_while_they_come_and_go(qos):
    """All of them, whatever their tier is called by the key; the fifty first are shown, and nobody twice."""
    async with tiered(qos) as cluster:
        for engine in cluster.engines:
            engine.hold = True
        names = [f"u{n}" for n in range(4 * SLICE)] + ["anna"] * 3
        requests = [replace(generation(f"{n}.x", max_tokens=4), owner=name) for n, name in enumerate(names)]
        running = [asyncio.create_task(cluster.sessions.generate(r, lambda batch: True)) for r in requests]
        dispatcher = cluster.server.dispatcher
        await until(lambda: dispatcher.waiting + dispatcher.ledger().held == len(names))
        slices = list(dispatcher.activity())
        assert len(slices) > 4
        seen = at_once(dispatcher.activity())
        assert (len(seen["users"]), seen["more_users"]) == (MOST_USERS, 4 * SLICE + 1 - MOST_USERS)
        assert (seen["users"][0]["user"], seen["users"][0]["waiting"] + seen["users"][0]["running"]) == ("anna", 3)
        tiers = {t["tier"]: (t["waiting"], t["running"]) for t in seen["tiers"]}
        assert sum(map(sum, tiers.values())) == len(names)
        assert list(tiers) == (["Gold", "Bronze"] if qos else [""])
        standing = dispatcher.standing("anna", "Bronze")["models"][MODEL]
        assert standing["waiting"] + standing["running"] == 3
        look = dispatcher.activity()
        next(look)
        for engine in cluster.engines:
            engine.hold = False
        await asyncio.gather(*running)
        assert at_once(look)["more_users"] < 4 * SLICE
        assert at_once(dispatcher.activity())["users"] == []
        assert cluster.server.ledger().balanced
