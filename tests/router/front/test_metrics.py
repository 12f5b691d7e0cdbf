"""The numbers of /metrics."""

from __future__ import annotations

from router.http.status import ReplicaRow
from router.metrics import MAX_USERS, TTFT_BUCKETS, Metrics
from workers.api.replica import LoadReport


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_a_request():
    clock = iter([0.0, 0.5, 0.75, 1.25, 2.0]).__next__
    metrics = Metrics(clock=clock)
    meter = metrics.request("m", "gold", "anna", 10)
    assert value(metrics, "echelon_front_requests", model_name="m") == 1
    meter.tokens(0, 1)
    meter.tokens(0, 2)
    meter.tokens(0, 0)  # nothing came: no time is taken
    meter.tokens(0, 1)
    meter.finished("length")
    meter.close()
    meter.close()
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", model_name="m") == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", model_name="m") == 0.75
    assert value(metrics, "vllm:inter_token_latency_seconds_count", model_name="m") == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", model_name="m") == 2.0
    assert value(metrics, "vllm:prompt_tokens_total", model_name="m") == 10
    assert value(metrics, "vllm:generation_tokens_total", model_name="m") == 4
    assert value(metrics, "vllm:request_success_total", model_name="m", finished_reason="length") == 1
    assert value(metrics, "echelon_requests_total", tier="gold", outcome="length") == 1
    assert value(metrics, "echelon_user_tokens_total", tier="gold", user="anna", kind="generation") == 4
    assert value(metrics, "echelon_front_requests", model_name="m") == 0


def test_refused_and_aborted_requests():
    metrics = Metrics(clock=lambda: 0.0)
    refused = metrics.request("m", "", "u", 10)
    refused.failed()
    refused.close()
    metrics.request("m", "", "u", 10).close()
    for reason in ("error", "abort"):
        assert value(metrics, "vllm:request_success_total", model_name="m", finished_reason=reason) == 1
    assert value(metrics, "vllm:prompt_tokens_total", model_name="m") is None
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", model_name="m") is None


def test_users_are_capped():
    metrics = Metrics()
    assert [metrics.user_label(f"u{i}") for i in range(MAX_USERS)][-1] == f"u{MAX_USERS - 1}"
    assert metrics.user_label("late") == "other"
    assert metrics.user_label("u0") == "u0"


def test_engines_are_read_at_the_scrape():
    rows = []
    metrics = Metrics(lambda: rows)
    load = LoadReport(
        step=9, running=3, waiting=2, free_blocks=25, total_blocks=100, preemptions=4, prefix_queries=50, prefix_hits=20
    )
    rows.append(ReplicaRow("r1", "m", "ready", load))
    rows.append(ReplicaRow("r2", "m", "starting"))
    at = {"model_name": "m", "engine": "r1"}
    assert value(metrics, "vllm:num_requests_running", **at) == 3
    assert value(metrics, "vllm:num_requests_waiting", **at) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", **at) == 0.75
    assert value(metrics, "vllm:num_preemptions_total", **at) == 4
    assert value(metrics, "vllm:prefix_cache_queries_total", **at) == 50
    assert value(metrics, "vllm:prefix_cache_hits_total", **at) == 20
    assert value(metrics, "echelon_replica_up", replica="r2", state="starting") == 0
    page = metrics.page().decode()
    assert 'vllm:num_requests_running{engine="r1",model_name="m"} 3.0' in page
    assert len(TTFT_BUCKETS) == 22


async def test_over_http(client, generator):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/chat/completions", json=body | {"stream": True, "n": 2})
    r = await client.get("/metrics")
    assert r.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'vllm:request_success_total{finished_reason="length",model_name="m"} 3.0' in r.text
    assert 'vllm:generation_tokens_total{model_name="m"} 15.0' in r.text
