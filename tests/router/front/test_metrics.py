"""The numbers of /metrics."""

from __future__ import annotations

import asyncio
import math
import threading

import httpx
from prometheus_client.parser import text_string_to_metric_families

from router.dispatch.lease import TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from router.engine_metrics import EngineMetrics
from router.generation import Trace
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.status import ReplicaRow
from router.metrics import MAX_LABELS, TTFT_BUCKETS, Label, Metrics
from router.metrics_page import merged
from workers.api.errors import NotAuthorized, Overloaded
from workers.api.replica import LoadReport

from .fakes import FakeGenerator, FakeStatus


def samples(page):
    """Every sample of a page by (name, labels); the page must parse, and each family stand in it once."""
    page = page.decode() if isinstance(page, bytes) else page
    comments = [line for line in page.splitlines() if line.startswith("#")]
    assert len(set(comments)) == len(comments)
    families = list(text_string_to_metric_families(page))
    assert len({f.name for f in families}) == len(families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_a_request():
    clock = iter([0.0, 0.5, 0.75, 1.25, 2.0]).__next__
    metrics = Metrics(clock=clock)
    traces = [Trace(0.125, "r1"), Trace(0.25, "r1", replays=1)]
    meter = metrics.request("m", "gold", "anna", 10, traces)
    assert value(metrics, "echelon_front_requests", model_name="m") == 1
    meter.tokens(0, 1)
    meter.tokens(0, 2)
    meter.tokens(0, 0)  # nothing came: no time is taken
    meter.tokens(0, 1)
    meter.finished("length")
    meter.close()
    meter.close()
    at = {"model_name": "m", "tier": "gold"}
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", **at) == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", **at) == 0.75
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **at) == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", **at) == 2.0
    assert value(metrics, "vllm:request_queue_time_seconds_sum", **at) == 0.25
    assert value(metrics, "echelon_replica_requests_total", replica="r1", outcome="length") == 1
    assert value(metrics, "echelon_replays_total", model_name="m") == 1
    assert value(metrics, "vllm:prompt_tokens_total", model_name="m") == 10
    assert value(metrics, "vllm:generation_tokens_total", model_name="m") == 4
    assert value(metrics, "vllm:request_success_total", model_name="m", finished_reason="length") == 1
    assert value(metrics, "echelon_requests_total", tier="gold", outcome="length") == 1
    assert value(metrics, "echelon_user_tokens_total", tier="gold", user="anna", kind="generation") == 4
    assert value(metrics, "echelon_front_requests", model_name="m") == 0


def test_refused_and_aborted_requests():
    metrics = Metrics(clock=lambda: 0.0)
    refused = metrics.request("m", "", "u", 10)
    refused.failed("rate_limit_exceeded", refused=True)
    refused.close()
    broken = metrics.request("m", "", "u", 10)
    broken.failed("engine_fault")
    broken.close()
    metrics.request("m", "", "u", 10).close()
    for reason, count in (("error", 2), ("abort", 1)):
        assert value(metrics, "vllm:request_success_total", model_name="m", finished_reason=reason) == count
    assert value(metrics, "echelon_refusals_total", reason="rate_limit_exceeded") == 1
    assert value(metrics, "echelon_refusals_total", reason="engine_fault") is None
    assert value(metrics, "vllm:prompt_tokens_total", model_name="m") is None
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", model_name="m", tier="") is None


def test_labels_are_capped():
    label = Label()
    assert [label(f"u{i}") for i in range(MAX_LABELS)][-1] == f"u{MAX_LABELS - 1}"
    assert label("late") == "other"
    assert label("u0") == "u0"


def test_engines_are_read_at_the_scrape():
    status = FakeStatus()
    engines = EngineMetrics(status)
    load = LoadReport(
        step=9, running=3, waiting=2, free_blocks=25, total_blocks=100, preemptions=4, prefix_queries=50, prefix_hits=20
    )
    status.rows += [ReplicaRow("r1", "m", "ready", load, 0.5), ReplicaRow("r2", "m", "suspect")]
    status.unleased = {"m": 7}
    page = samples(engines.page())
    at = (("engine", "r1"), ("model_name", "m"))
    assert page["vllm:num_requests_running", at] == 3
    assert page["vllm:num_requests_waiting", at] == 2
    assert page["vllm:num_requests_waiting", (("engine", "dispatcher"), ("model_name", "m"))] == 7
    assert page["vllm:kv_cache_usage_perc", at] == 0.75
    assert page["vllm:num_preemptions_total", at] == 4
    assert page["vllm:prefix_cache_queries_total", at] == 50
    assert page["vllm:prefix_cache_hits_total", at] == 20
    assert page["echelon_replica_up", (("replica", "r2"), ("state", "suspect"))] == 0
    assert page["echelon_replica_since_step_seconds", (("replica", "r1"),)] == 0.5
    assert page["echelon_replica_since_step_seconds", (("replica", "r2"),)] == math.inf
    assert len(TTFT_BUCKETS) == 22


async def test_over_http(client, generator):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/chat/completions", json=body | {"stream": True, "n": 2})
    await client.post("/v1/chat/completions", json=body | {"n": -1})
    await client.post("/v1/chat/completions", json=body | {"model": "nobody's"})
    generator.refusal = Overloaded("full")
    await client.post("/v1/chat/completions", json=body)
    r = await client.get("/metrics")
    assert r.headers["content-type"].startswith("text/plain; version=0.0.4")
    page = samples(r.text)
    assert page["vllm:request_success_total", (("finished_reason", "length"), ("model_name", "m"))] == 3
    assert page["vllm:generation_tokens_total", (("model_name", "m"),)] == 15
    refusals = {dict(labels)["reason"]: n for (name, labels), n in page.items() if name == "echelon_refusals_total"}
    assert refusals.pop("rate_limit_exceeded") == 1
    assert refusals.pop("model_not_found") == 1
    assert sum(refusals.values()) == 1


def test_pages_of_two_fronts_are_one_page():
    fronts = [Metrics(), Metrics()]
    for i, metrics in enumerate(fronts):
        meter = metrics.request("m", "", 'anna "{', 10)
        for _ in range(i + 1):
            meter.tokens(0, 1)
        meter.finished("stop")
        meter.close()
    page = samples(merged([(f"f{i}", metrics.page()) for i, metrics in enumerate(fronts)]))
    for i in (0, 1):
        assert page["vllm:generation_tokens_total", (("front", f"f{i}"), ("model_name", "m"))] == i + 1
    labels = (("front", "f1"), ("kind", "prompt"), ("tier", ""), ("user", 'anna "{'))
    assert page["echelon_user_tokens_total", labels] == 10
    assert len(page) == 2 * len(samples(fronts[0].page()))
    assert samples(merged([("f", b"# HELP a b\n# TYPE a gauge\na 1.0\n")])) == {("a", (("front", "f"),)): 1}


async def test_a_slow_scrape_does_not_hold_others_up(tokenizer):
    """The page is written in a thread: the loop goes on meanwhile."""
    others_went_on = threading.Event()

    class Slow(FakeStatus):
        def replicas(self):
            self.in_time = others_went_on.wait(timeout=30)
            return []

    status = Slow()
    app = create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], FakeGenerator(tokenizer), status)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=60) as client:
        scrape = asyncio.create_task(client.get("/metrics"))
        await asyncio.sleep(0.01)
        assert (await client.get("/v1/models")).status_code == 200
        others_went_on.set()
        assert (await scrape).status_code == 200
    assert status.in_time


async def test_a_refusal_at_the_gate_counts(tokenizer):
    class Nobody:
        def resolve(self, headers, client):
            raise NotAuthorized("Incorrect API key provided.", code="invalid_api_key")

    metrics = Metrics()
    models = [ServedModel("m", tokenizer, 256)]
    app = create_app(FrontConfig(), models, FakeGenerator(tokenizer), FakeStatus(), identity=Nobody(), metrics=metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/health")).status_code == 200
    assert value(metrics, "echelon_refusals_total", reason="invalid_api_key") == 1


def test_the_tiers_of_the_queue():
    status = FakeStatus()
    assert "qos_" not in EngineMetrics(status).page().decode()
    status.tier_rows = [
        TierRow("m", "Gold", 3, 1.5, 2.5, 70.0, 100.0, 0.01, 2),
        TierRow("m", "Bronze", 0, *[0.0] * 5, 0),
    ]
    seen = samples(EngineMetrics(status).page())
    at = (("model_name", "m"), ("tier", "Gold"))
    names = {name: number for (name, labels), number in seen.items() if labels == at}
    assert names == {
        "echelon_tier_waiting": 3,
        "echelon_tier_oldest_wait_seconds": 1.5,
        "echelon_tier_expected_wait_seconds": 2.5,
        "qos_service_gap": 70.0,
        "qos_service_gap_bound": 100.0,
        "qos_share_error": 0.01,
        "qos_bound_violations_total": 2,
    }
    assert seen["qos_bound_violations_total", (("model_name", "m"), ("tier", "Bronze"))] == 0


def test_sessions():
    status = FakeStatus(session_counts=SessionCounts(7, 2, 9000, (("expired", 3), ("memory", 1))))
    seen = samples(EngineMetrics(status).page())
    assert [seen[f"echelon_{name}", ()] for name in ("sessions", "session_rounds", "session_bytes")] == [7, 2, 9000]
    evicted = {labels: n for (name, labels), n in seen.items() if name == "echelon_sessions_evicted_total"}
    assert evicted == {(("reason", "expired"),): 3, (("reason", "memory"),): 1}


def test_blocks_in_host_memory():
    load = LoadReport(1, host_blocks=3, total_host_blocks=4, copied_out=9, copied_in=5, host_hits=64, prefix_hits=80)
    status = FakeStatus(rows=[ReplicaRow("r", "m", "ready", load), ReplicaRow("s", "m", "ready", LoadReport(1))])
    seen = samples(EngineMetrics(status).page())
    at, other = ((("engine", name), ("model_name", "m")) for name in "rs")
    names = ("host_blocks", "host_cache_usage_perc", "blocks_copied_out_total", "blocks_copied_in_total")
    names += ("host_prefix_hits_total",)
    assert [seen[f"echelon_{name}", at] for name in names] == [3, 0.75, 9, 5, 64]
    assert [seen[f"echelon_{name}", other] for name in names] == [0] * 5


def test_tokens_executed_by_tier():
    status = FakeStatus(work_rows=[WorkRow("m", "Gold", "decode", 30), WorkRow("m", "", "overhead", 4)])
    status.rows = [ReplicaRow("r", "m", "ready", LoadReport(1, executed_tokens=34))]
    seen = samples(EngineMetrics(status).page())
    books = {dict(labels)["tier"]: n for (name, labels), n in seen.items() if name == "qos_tokens_total"}
    assert books == {"Gold": 30, "": 4}
    assert seen["echelon_executed_tokens_total", (("engine", "r"), ("model_name", "m"))] == sum(books.values())
