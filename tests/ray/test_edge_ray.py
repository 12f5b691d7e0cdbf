"""The edge of a whole cluster: HAProxy as Ray Serve starts it and reloads it, and the ingress behind."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from watching import await_true, listening

pytestmark = pytest.mark.ray

BODY = json.dumps({"model": "demo", "prompt": "Hello!", "max_tokens": 1}).encode()


def exchange(url: str, sent: bytes) -> bytes:
    """All that comes back for `sent` until the server closes."""
    with connect(url) as s:
        s.sendall(sent)
        data = b""
        while piece := s.recv(65536):
            data += piece
    return data


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def post(*headers: str, length: int = len(BODY)) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {length}", "connection: close", *headers, "", ""]).encode()


def status_and_error(shown: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = shown.partition(b"\r\n\r\n")
    assert head.lower().count(b"x-request-id:") == 1
    error: dict[str, Any] = json.loads(body)["error"]
    return int(head.split()[1]), error


def test_a_header_that_never_ends(cluster: Any) -> None:
    shown = exchange(cluster.base_url, post()[:-10])  # HAProxy ends it, or this test at its socket's deadline
    assert shown.split()[1:2] == [b"408"]


def test_a_body_that_never_ends(cluster: Any) -> None:
    """The answer comes at once; HAProxy 2.8 closes only after its idle timeout, since it waits for the rest."""
    with connect(cluster.base_url) as s:
        s.sendall(post(length=1000) + BODY)
        shown = b""
        while not shown.endswith(b"}}"):
            piece = s.recv(65536)
            assert piece, shown
            shown += piece
    status, error = status_and_error(shown)
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_body_that_waits_to_be_asked_for(cluster: Any) -> None:
    with connect(cluster.base_url) as s:
        s.sendall(post("expect: 100-continue"))
        assert s.recv(65536).startswith(b"HTTP/1.1 100")
        s.sendall(BODY)
        assert s.recv(65536).startswith(b"HTTP/1.1 200")


def test_clients_that_leave_while_they_send(cluster: Any) -> None:
    for cut in range(1, len(BODY), 7):
        with connect(cluster.base_url) as s:
            s.sendall(post() + BODY[:cut])
    assert cluster.post("/completions", json.loads(BODY))[0] == 200  # and the ledgers are checked after it


def test_a_body_over_the_cap_in_chunks(cluster: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with connect(cluster.base_url) as s:
        s.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        shown = b""
        try:
            for _ in range(100):  # 100 MiB: it never gets that far
                s.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        except OSError:
            pass  # it closed
        try:
            while piece := s.recv(65536):
                shown += piece
        except ConnectionResetError:
            pass
    assert not shown or shown.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("claim", ["203.0.113.9", "127.0.0.1, 203.0.113.9", "garbage"])
def test_a_client_is_who_it_is(cluster: Any, claim: str) -> None:
    """Without keys only loopback is served: who is believed to be elsewhere gets 401."""
    shown = exchange(cluster.base_url, post(f"x-forwarded-for: {claim}", "x-echelon-edge: guess") + BODY)
    assert shown.startswith(b"HTTP/1.1 200"), shown


def ingresses() -> dict[str, int]:
    """Name and port of each ingress replica in HAProxy's own configuration."""
    (configuration,) = Path(os.environ["ECHELON_EDGE"]).parent.glob("*/haproxy.cfg")
    servers = [
        line.split()
        for line in configuration.read_text().splitlines()
        if line.strip().startswith("server ") and "backup" not in line
    ]
    return {words[1]: int(words[2].rsplit(":", 1)[1]) for words in servers}


def test_an_ingress_believes_nobody_who_does_not_show_the_secret(cluster: Any) -> None:
    (port,) = ingresses().values()
    for headers in (["x-forwarded-for: 203.0.113.9"], ["x-forwarded-for: 203.0.113.9", "x-echelon-edge: guess"]):
        assert exchange(f"http://127.0.0.1:{port}", post(*headers) + BODY).startswith(b"HTTP/1.1 200")


def check_rules(cluster: Any) -> None:
    for path in ("/-/routes", "/%2d/routes"):
        request = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
        status, error = status_and_error(exchange(cluster.base_url, request))
        assert (status, error["code"]) == (404, "unknown_url")
    for path in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        assert listening(int(os.environ[path])) == {"0100007F"}


def test_rules_stand_after_a_new_ingress(cluster: Any) -> None:
    import ray

    check_rules(cluster)
    before = ingresses()
    (name,) = [
        n["name"]
        for n in ray.util.list_named_actors(all_namespaces=True)
        if n["namespace"] == "serve" and n["name"].startswith("SERVE_REPLICA::") and "#ingress#" in n["name"]
    ]
    ray.kill(ray.get_actor(name, namespace="serve"))

    def answers() -> bool:
        try:
            return bool(cluster.post("/completions", json.loads(BODY))[0] == 200)
        except OSError:  # a connection that the dead one held
            return False

    await_true(lambda: ingresses().keys() != before.keys() and answers(), "no new ingress answers")
    check_rules(cluster)


def test_only_haproxy_listens_for_the_open(cluster: Any) -> None:
    for port in [*ingresses().values(), int(os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])]:
        assert listening(port) == {"0100007F"}
