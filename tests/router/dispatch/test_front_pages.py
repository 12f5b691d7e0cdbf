"""Metrics of several fronts, over the dispatcher."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router import metrics_page
from router.cluster_status import ClusterStatus
from router.dispatch.client import DispatcherClient
from router.engine_metrics import EngineMetrics
from router.metrics import Metrics
from router.metrics_page import FrontMetrics

from .fakes import SECRET, Cluster, generation, until


def tokens(page: bytes) -> dict[str, float]:
    """Generated tokens by front; the page must parse, each family once."""
    families = list(text_string_to_metric_families(page.decode()))
    assert len({f.name for f in families}) == len(families)
    samples = [s for f in families for s in f.samples if s.name == "vllm:generation_tokens_total"]
    return {s.labels["front"]: s.value for s in samples}


def serve(metrics: Metrics) -> None:
    meter = metrics.request("m", "", "anna", 3)
    meter.tokens(0, 5)
    meter.finished("stop")
    meter.close()


async def test_any_front_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page, "PUSH_SECONDS", 0.02)
    async with Cluster() as cluster:
        gateway = DispatcherClient("gateway-1", secret=SECRET, locate=cluster._locate)
        gateway.start()
        mine, other = Metrics(), Metrics()
        front = FrontMetrics(cluster.client, mine, EngineMetrics(ClusterStatus(cluster.client)))
        behind = FrontMetrics(gateway, other)
        behind.start()
        serve(mine)
        serve(other)
        serve(other)
        await until(lambda: b"generation_tokens_total" in cluster.server._pages.get("gateway-1", b""))
        page = await front.page()
        assert tokens(page) == {"ingress-1": 5, "gateway-1": 10}
        assert b'vllm:num_requests_running{engine="r0",model_name="demo"}' in page
        assert tokens(await behind.page()) == {"ingress-1": 5, "gateway-1": 10}  # ours went by the dispatcher
        await behind.close()
        await gateway.close()
        await until(lambda: "gateway-1" not in cluster.server._pages)
        assert tokens(await front.page()) == {"ingress-1": 5}


async def test_without_a_dispatcher_a_front_shows_its_own() -> None:
    async with Cluster() as cluster:
        mine = Metrics()
        serve(mine)
        front = FrontMetrics(cluster.client, mine)
        await cluster.stop_dispatcher()
        assert tokens(await front.page()) == {"ingress-1": 5}


async def test_a_dispatcher_that_goes_away_leaves_nobody_asking() -> None:
    async with Cluster() as cluster:
        with pytest.raises(ConnectionError):
            await cluster.client.ask(lambda number: metrics_page.FrontPage(b""), seconds=0.01)
        assert not cluster.client._asked


async def test_the_generator_tells_what_became_of_a_request() -> None:
    async with Cluster() as cluster:
        request = generation("a", max_tokens=500)
        for engine in cluster.engines:
            engine.hold = True
        task = asyncio.create_task(cluster.sessions.generate(request, lambda batch: True))
        await until(lambda: "a/0#0" in cluster.engine_of)
        victim = cluster.engine_of["a/0#0"]
        assert request.trace.replica == victim.id
        for engine in cluster.engines:
            engine.hold = False
        await victim.kill()
        await task
        assert request.trace.replica not in ("", victim.id)
        assert request.trace.replays == 1
        assert request.trace.queue_seconds > 0
        cluster.engines.remove(victim)
