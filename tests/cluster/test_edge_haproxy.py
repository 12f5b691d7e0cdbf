"""The wrapper's HAProxy on a recorded configuration, without Ray: what the open may do to it, and what it may not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from haproxy_run import SECRET, TLS, Answer, Edge, new_edge, read_answer, read_end, request, settings
from watching import await_true, listening

from cluster.tls import context_trusting

Start = Callable[..., Edge]
PATIENT = {"idle_timeout": 60.0, "keep_alive_timeout": 60.0}  # but for headers
SPOOFED = (
    "x-forwarded-for: 203.0.113.9\nX-Forwarded-Proto: https\nx-forwarded-prefix: /v1\n"
    "forwarded: for=203.0.113.9\nx-echelon-edge: guess"
)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts an HAProxy with changed settings; one with the same is used again."""
    running: dict[str, Edge] = {}

    def one(**changes: Any) -> Edge:
        key = repr(sorted(changes.items()))
        if key not in running:
            edge = running[key] = new_edge()
            process = edge.run(edge.text(), settings(**changes))

            def up() -> bool:
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                try:
                    trust = context_trusting(TLS / "cert.pem") if "tls_cert" in changes else None
                    return edge.ask("GET /up HTTP/1.1", trust=trust).status == 200
                except OSError:
                    return False

            await_true(up, "HAProxy does not answer")
        return running[key]

    yield one
    for edge in running.values():
        stop(edge)


@pytest.fixture
def edge(start: Start) -> Edge:
    return start()


def stop(edge: Edge) -> None:
    for process in edge.processes:
        process.terminate()
        process.wait(timeout=20)
        assert process.stderr
        process.stderr.close()
    edge.backend.shutdown()
    edge.backend.server_close()
    shutil.rmtree(edge.folder)


def refused(answer: Answer, status: int, code: str | None) -> None:
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]


def test_a_client_is_who_it_is(edge: Edge) -> None:
    for source in ("127.0.0.1", "127.0.0.5"):
        seen = edge.ask(f"GET /v1/models HTTP/1.1\n{SPOOFED}\nX-Request-Timeout-Seconds: 1", source=source).seen
        told = [(k, v) for k, v in seen["headers"] if k.startswith(("x-", "forwarded"))]
        assert sorted(told) == [
            ("x-echelon-edge", SECRET),
            ("x-forwarded-for", source),
            ("x-forwarded-proto", "http"),
            ("x-request-id", dict(told)["x-request-id"]),
        ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("mine-1", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("has space", False),
        ("a,b", False),
        ("\xff", False),
        ("one\nx-request-id: two", False),
    ],
)
def test_request_ids(edge: Edge, given: str, kept: bool) -> None:
    answer = edge.ask(f"GET / HTTP/1.1\nx-request-id: {given}")
    assert answer.status == 200
    shown = answer.headers["x-request-id"]
    assert [v for k, v in answer.seen["headers"] if k == "x-request-id"] == [shown]
    assert shown == given if kept else shown.startswith("req-")


@pytest.mark.parametrize(
    "path", ["/-/routes", "/-/ROUTES", "/%2d/routes", "/%2D%2Froutes", "/-/", "/-/metrics?x", "http://x/-/routes"]
)
def test_routes_of_serve_are_gone(edge: Edge, path: str) -> None:
    refused(edge.ask(f"GET {path} HTTP/1.1"), 404, "unknown_url")


def test_serves_health_is_for_this_machine(edge: Edge) -> None:
    assert edge.ask("GET /-/healthz HTTP/1.1").status == 200


def test_statistics_and_metrics_are_on_loopback_only(start: Start) -> None:
    edge = start(host="0.0.0.0")
    assert listening(edge.port) == {"00000000"}
    assert listening(edge.stats_port) == {"0100007F"}
    assert listening(edge.metrics_port) == {"0100007F"}
    assert (edge.folder / "admin.sock").stat().st_mode & 0o777 == 0o600
    for path in ("/stats", "/metrics"):
        assert edge.ask(f"GET {path} HTTP/1.1").seen["path"] == path  # not HAProxy's own


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-ty",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20,
    ],
    ids=["nothing", "a letter", "half a header", "no end"],
)
def test_a_half_sent_header_is_ended(start: Start, begun: bytes) -> None:
    edge = start(**PATIENT)
    with edge.connect() as s:
        s.sendall(begun)
        shown = read_end(s)  # it ends at the deadline, or this test at its socket's
        assert shown == b"" or shown.startswith((b"HTTP/1.0 408 ", b"HTTP/1.1 408 "))


def test_a_header_that_trickles_is_ended(start: Start) -> None:
    edge = start(**PATIENT)
    with edge.connect() as s:
        s.settimeout(0.1)
        begun = b"GET / HTTP/1.1\r\na: "
        for _ in range(200):  # far from any cap on size
            s.sendall(begun)
            begun = b"b"
            try:
                assert s.recv(1000).split()[1:2] == [b"408"]
                return
            except TimeoutError:
                continue
    pytest.fail("it may go on")


def test_a_quiet_connection_is_ended_between_requests(edge: Edge) -> None:
    with edge.connect() as s:
        for _ in range(2):
            s.sendall(request("GET / HTTP/1.1"))
            assert read_answer(s).status == 200
        assert read_end(s) == b""


def test_a_long_silence_of_the_server_cuts_nothing(edge: Edge) -> None:
    edge.backend.gap = 1.5  # longer than a client may be idle
    try:
        with edge.connect() as s:
            s.sendall(request("POST /pauses HTTP/1.1\ncontent-length: 2") + b"{}")
            assert read_answer(s).status == 200
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                piece = s.recv(1000)
                assert piece, data
                data += piece
            assert data == b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"
    finally:
        edge.backend.gap = 0.0


def test_a_client_that_reads_nothing_is_cut(edge: Edge) -> None:
    with edge.connect() as s:
        s.sendall(request("GET /floods HTTP/1.1"))
        await_true(lambda: "/floods was cut" in edge.backend.seen, "it may hold on")


def test_a_server_hears_of_clients_that_leave(start: Start) -> None:
    """Of nearly all: without a rule for it of half of those whose body comes just behind the headers."""
    edge, tries = start(idle_timeout=15.0), 24
    for number in range(tries):
        with edge.connect() as s:
            s.sendall(request("POST /thinks HTTP/1.1\ncontent-type: application/json\ncontent-length: 2"))
            time.sleep(0.002)
            s.sendall(b"{}")
            await_true(lambda n=number: edge.backend.seen.count("/thinks") > n, "no request came")  # type: ignore[misc]
    await_true(lambda: edge.backend.seen.count("/thinks was left") >= tries - 5, "too few were heard of")


def test_a_body_that_does_not_end_is_ended(edge: Edge) -> None:
    with edge.connect() as s:
        s.sendall(request("POST /x HTTP/1.1\ncontent-type: application/json\ncontent-length: 20") + b"{")
        refused(read_answer(s), 408, "request_timeout")


@pytest.mark.parametrize("length", ["100001", "99999999999", "9" * 18])
def test_a_length_over_the_cap_is_refused_unread(edge: Edge, length: str) -> None:
    before = len(edge.backend.seen)
    with edge.connect() as s:
        s.sendall(request(f"POST / HTTP/1.1\ncontent-length: {length}\nexpect: 100-continue"))
        refused(read_answer(s), 413, "request_too_large")
        assert read_end(s) == b""
    assert len(edge.backend.seen) == before


def test_bodies_pass(edge: Edge) -> None:
    assert edge.ask("POST / HTTP/1.1\ncontent-length: 100000", b"x" * 100_000).seen["body"] == 100_000
    chunks = b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
    assert edge.ask("POST / HTTP/1.1\ntransfer-encoding: chunked", chunks).seen["body"] == 6


@pytest.mark.parametrize(
    "head",
    [
        "CONNECT example.org:443 HTTP/1.1",
        "TRACE / HTTP/1.1",
        "PROPFIND / HTTP/1.1",
        f"{'A' * 5000} / HTTP/1.1",
    ],
    ids=lambda h: h[:8],
)
def test_methods_that_nobody_has(edge: Edge, head: str) -> None:
    answer = edge.ask(head)
    assert answer.status in (400, 405)
    if answer.status == 405:
        refused(answer, 405, "method_not_supported")
        assert "POST" in answer.headers["allow"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"\x00\xff" * 500 + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n bad: folded\r\nb ad: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /a#b\x7f HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["tls", "binary", "word", "http2", "header20k", "headers500", "name", "nul", "delete"],
)
def test_garbage_is_refused_and_closed(edge: Edge, sent: bytes) -> None:
    before = len(edge.backend.seen)
    with edge.connect() as s:
        s.sendall(sent)
        shown = read_end(s)
    assert shown.split()[1:2] == [b"400"], shown[:200]
    assert len(edge.backend.seen) == before


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("content-length: 5\ncontent-length: 6", b"hello!"),
        ("content-length: 5, 6", b"hello!"),
        ("content-length: +5", b"hello"),
        ("transfer-encoding: chunked, identity", b"0\r\n\r\n"),
        ("transfer-encoding: xchunked", b"0\r\n\r\n"),
        ("transfer-encoding: chunked\ntransfer-encoding: chunked", b"0\r\n\r\n"),
        ("transfer-encoding: chunked", b"zz\r\nhello\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked", b"-5\r\nhello\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked", b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked", b"5\nhello\n0\n\n"),
    ],
)
def test_two_lengths_are_one_too_many(edge: Edge, headers: str, body: bytes) -> None:
    before = len(edge.backend.seen)
    with edge.connect() as s:
        s.sendall(request(f"POST / HTTP/1.1\n{headers}") + body + request("GET /smuggled HTTP/1.1"))
        shown = read_end(s)
    assert shown.split()[1:2] == [b"400"], shown[:200]
    assert shown.count(b"HTTP/1.") == 1
    assert edge.backend.seen[before:] == []


@pytest.mark.parametrize("order", [1, -1])
def test_of_length_and_chunks_only_the_chunks_pass(edge: Edge, order: int) -> None:
    both = ["content-length: 5", "transfer-encoding: chunked"][::order]
    before = len(edge.backend.seen)
    with edge.connect() as s:  # as RFC 9112, 6.3 has it
        s.sendall(request("\n".join(["POST / HTTP/1.1", *both])) + b"0\r\n\r\n" + request("GET /smuggled HTTP/1.1"))
        answer = read_answer(s)
        assert read_end(s) == b""
    names = [k for k, _ in answer.seen["headers"]]
    assert "transfer-encoding" in names
    assert "content-length" not in names
    assert edge.backend.seen[before:] == ["/"]


def test_nobody_is_upgraded(edge: Edge) -> None:
    for protocol in ("websocket\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", "h2c\nhttp2-settings: AAAA"):
        seen = edge.ask(f"GET / HTTP/1.1\nconnection: upgrade\nupgrade: {protocol}").seen
        assert "upgrade" not in dict(seen["headers"])


def test_its_own_answers_have_our_shape(start: Start) -> None:
    edge = start(max_body_bytes=99_999)
    refused(edge.ask("GET /breaks HTTP/1.1"), 502, "bad_gateway")
    edge.backend.shutdown()
    edge.backend.server_close()

    def refuses() -> bool:
        answer = edge.ask("GET / HTTP/1.1\nx-request-id: mine")
        assert answer.headers["x-request-id"] == "mine"
        return answer.status == 503 and answer.error["code"] == "no_front" and answer.headers["retry-after"] == "1"

    await_true(refuses, "503 was expected")


def test_tls(start: Start) -> None:
    edge = start(tls_cert=str(TLS / "cert.pem"), tls_key=str(TLS / "key.pem"))
    trust = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        trust.minimum_version = trust.maximum_version = version
        seen = edge.ask(f"GET / HTTP/1.1\n{SPOOFED}", trust=trust).seen
        assert dict(seen["headers"])["x-forwarded-proto"] == "https"
    old = context_trusting(TLS / "cert.pem")
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        edge.ask("GET / HTTP/1.1", trust=old)
    assert (edge.folder / "tls.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("sent", [request("GET / HTTP/1.1"), b"", b"\x16\x03\x01"], ids=["http", "nothing", "half"])
def test_no_handshake_no_hang(start: Start, sent: bytes) -> None:
    edge = start(tls_cert=str(TLS / "cert.pem"), tls_key=str(TLS / "key.pem"))
    with edge.connect() as s:
        s.sendall(sent)
        assert b"HTTP/1.1 200" not in read_end(s)


def test_a_reload_keeps_streams_and_rules(start: Start) -> None:
    """The recorded configuration has the old one end 2 s after the reload, whatever it carries."""
    edge = start(keep_alive_timeout=0.9)
    first = edge.processes[0]
    edge.backend.gap = 1.4
    with edge.connect() as s:
        s.sendall(request("GET /pauses HTTP/1.1"))
        await_true(lambda: "/pauses" in edge.backend.seen, "the stream has not begun")
        sock = str(edge.folder / "admin.sock")
        changed = settings(max_body_bytes=5, keep_alive_timeout=0.9)
        second = edge.run(edge.text(), changed, "-sf", str(first.pid), "-x", sock)

        def taken_over() -> bool:
            assert second.poll() is None
            return edge.ask("POST / HTTP/1.1\ncontent-length: 6", b"hello!").status == 413

        await_true(taken_over, "the new one does not answer")
        os.kill(first.pid, signal.SIGUSR1)  # as Ray does
        assert b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n" in read_answer(s).body + read_end(s)
    edge.backend.gap = 0.0
    refused(edge.ask("GET /-/routes HTTP/1.1"), 404, "unknown_url")
    await_true(lambda: first.poll() is not None, "the old one goes on")


def test_more_connections_than_the_cap_wait(start: Start) -> None:
    edge = start(max_connections=3, keep_alive_timeout=5.0)
    held = [edge.connect() for _ in range(3)]
    for s in held:
        s.sendall(request("GET / HTTP/1.1"))
        assert read_answer(s).status == 200
    with edge.connect() as late:
        late.settimeout(0.5)
        late.sendall(request("GET / HTTP/1.1"))
        with pytest.raises(socket.timeout):
            late.recv(1)
        held.pop().close()
        late.settimeout(20)
        assert read_answer(late).status == 200
    for s in held:
        s.close()
