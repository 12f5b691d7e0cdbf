"""What operators and retrying clients see of a whole cluster: metrics, logs, idempotency keys."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from watching import await_true

pytestmark = pytest.mark.ray

BODY = json.dumps(
    {"model": "demo", "messages": [{"role": "user", "content": "Say something."}], "temperature": 2.0}
).encode()
LONG_BODY = json.dumps({**json.loads(BODY), "ignore_eos": True, "max_tokens": 600}).encode()


def ask(cluster: Any, key: str, body: bytes = BODY, **headers: str) -> tuple[bytes, bool]:
    """The body of a 200, and whether it was kept."""
    request = urllib.request.Request(
        cluster.base_url + "/chat/completions",
        data=body,
        headers={"content-type": "application/json", "idempotency-key": key, **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read(), answer.headers.get("idempotent-replayed") == "true"


def page(cluster: Any) -> dict[str, list[Any]]:
    """The samples of /metrics by name."""
    with urllib.request.urlopen(cluster.base_url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples: dict[str, list[Any]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def streamed(cluster: Any) -> dict[str, float]:
    """Streams so far by their way."""
    return {s.labels["way"]: s.value for s in page(cluster).get("echelon_streams_total", [])}


def leased(cluster: Any) -> bool:
    return any(r.leases for r in cluster.rows())


def generated(cluster: Any) -> float:
    return sum(s.value for s in page(cluster).get("vllm:generation_tokens_total", []))


def test_a_client_that_leaves_and_comes_back_is_charged_once(cluster: Any) -> None:
    """It leaves in the middle of an answer (or, on a machine too fast to see that, right after it)."""
    before = generated(cluster)
    where = urlsplit(cluster.base_url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"idempotency-key: left\r\ncontent-length: {len(LONG_BODY)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(head.encode() + LONG_BODY)
        await_true(lambda: generated(cluster) > before or leased(cluster), "the request did not start")
    body, kept = ask(cluster, "left", body=LONG_BODY)
    assert kept
    assert generated(cluster) - before == json.loads(body)["usage"]["completion_tokens"]


def test_events_go_straight_to_the_connection_that_haproxy_opened(cluster: Any) -> None:
    """Not through Serve's layers: with other layers the front would be slow, and nothing else would fail."""
    before = streamed(cluster)
    request = urllib.request.Request(
        cluster.base_url + "/chat/completions",
        data=json.dumps({**json.loads(BODY), "stream": True, "max_tokens": 8}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    after = streamed(cluster)
    assert after["straight"] == before.get("straight", 0.0) + 1
    assert after.get("asgi", 0.0) == before.get("asgi", 0.0)


def test_the_gateways_requests_are_on_the_page(cluster: Any) -> None:
    import ray

    from echelon import connect

    ray.get(connect().generate.remote("What is 3 + 4?", max_tokens=8, temperature=0, ignore_eos=True))

    def shown() -> list[Any]:
        return [s for s in page(cluster).get("vllm:generation_tokens_total", []) if "gateway-" in s.labels["front"]]

    await_true(shown, "the gateway's tokens are nowhere to be scraped")
    samples = page(cluster)
    ids = {r.info.id for r in (*cluster.ready(), *cluster.ready("second"))}
    assert {s.labels["engine"] for s in samples["vllm:num_requests_running"]} == ids
    assert all(s.value < 60 for s in samples["echelon_replica_since_step_seconds"])


def test_a_request_leaves_a_line(cluster: Any) -> None:
    import ray

    ask(cluster, "k-logged", **{"x-request-id": "find-me-1"})
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"

    def lines() -> list[str]:
        texts = (path.read_text("utf-8", "replace") for path in logs.glob("worker-*.err"))
        return [line for text in texts for line in text.splitlines() if "request=find-me-1 request finished" in line]

    await_true(lines, "no log has the request")
    (line,) = lines()
    assert " model=demo " in line
    assert any(f"replica={r.info.id}" in line for r in cluster.rows())
    assert "Say something" not in line


def test_a_request_is_explained(cluster: Any) -> None:
    """Without keys a user is who it says; the time of its request is told in parts, and where it could have run."""
    request = urllib.request.Request(
        cluster.base_url + "/chat/completions_qos",
        data=json.dumps({"model": "demo", "messages": "What is 3 + 4?", "user_id": "anna"}).encode(),
        headers={"content-type": "application/json", "x-request-id": "explain-me"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        usage = json.load(answer)["usage"]
    told: dict[str, Any] = {}

    def ended() -> bool:  # the front tells of the end after the answer's last byte
        url = cluster.base_url.removesuffix("/v1") + "/requests/explain-me/explain"
        with urllib.request.urlopen(url, timeout=10) as answer:
            told.update(json.load(answer))
        return told["state"] == "ended" and told["seconds"] is not None

    await_true(ended, "its end was not told")
    assert (told["owner"], told["outcome"], told["output_tokens"]) == ("anna", "stop", usage["completion_tokens"])
    parts = dict(told["seconds"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=1e-5)
    (lease,) = told["leases"]
    assert {c["replica"] for c in lease["candidates"]} == {r.info.id for r in cluster.ready()}
    assert lease["end"]["first_token_seconds"] > 0.0
    assert lease["end"]["units"] > usage["completion_tokens"]


def test_a_retry_gets_the_same_answer_also_after_its_front_died(cluster: Any) -> None:
    import ray

    first, kept = ask(cluster, "k1")
    assert not kept
    assert ask(cluster, "k1") == (first, True)
    assert ask(cluster, "k2")[0] != first
    (ingress,) = (a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "front#ingress" in a["name"])
    ray.kill(ray.get_actor(ingress, namespace="serve"))
    answers: list[tuple[bytes, bool]] = []

    def answered() -> bool:
        try:
            answers.append(ask(cluster, "k1"))
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            answers.clear()
        return len(answers) >= 20  # in a row: connections are cut while the proxy takes up the new front

    await_true(answered, "no front came back")
    assert set(answers) == {(first, True)}
