"""What `echelon serve` waits for, and what it shows when that does not come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from cluster.first_answer import await_answer, base_url, cause
from workers.api.errors import EchelonError

TRACEBACK = """The deployment failed to start 6 times in a row. Error:
\x1b[36mray::ServeReplica\x1b[39m
Traceback (most recent call last):
  File "rank.py", line 65, in __init__
{}"""


class Front(BaseHTTPRequestHandler):
    """Answers with the statuses of `plan`, then with 200."""

    plan: ClassVar[list[int]] = []
    seen: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        self.seen.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        status = self.plan.pop(0) if self.plan else 200
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"why": "a reason"}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(Front, "plan", [])
    monkeypatch.setattr(Front, "seen", [])
    with HTTPServer(("127.0.0.1", 0), Front) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield base_url("127.0.0.1", server.server_port)
        server.shutdown()
        thread.join()


def test_a_front_that_is_not_there_yet_is_waited_for(front: str) -> None:
    Front.plan[:] = [404, 503, 429]
    await_answer(front, "demo", 30.0)
    assert len(Front.seen) == 4
    path, body = Front.seen[-1]
    assert path == "/v1/completions"
    assert json.loads(body)["prompt"]


def test_a_failed_start_ends_the_wait(front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.first_answer.WATCH_SECONDS", 0.0)
    Front.plan[:] = [503] * 100

    def watch() -> None:
        raise EchelonError("no replica starts")

    with pytest.raises(EchelonError, match="no replica starts"):
        await_answer(front, "demo", 30.0, watch)


@pytest.mark.parametrize("status", [400, 401])
def test_a_refusal_is_final(front: str, status: int) -> None:
    Front.plan[:] = [status]
    with pytest.raises(EchelonError, match="a reason"):
        await_answer(front, "demo", 30.0)
    assert len(Front.seen) == 1


def test_no_answer_is_said_with_the_last_one(front: str) -> None:
    Front.plan[:] = [503] * 100
    with pytest.raises(EchelonError, match="a reason"):
        await_answer(front, "demo", 0.3)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (TRACEBACK.format("workers.api.errors.ConfigError: no model for X: there is Y"), "no model for X: there is Y"),
        (TRACEBACK.format("workers.api.errors.OutOfMemory: too large\nmake it less"), "too large\nmake it less"),
        (TRACEBACK.format("ValueError: odd"), "ValueError: odd"),
        ("no node has 3 GPUs\nplease add one", "no node has 3 GPUs\nplease add one"),
    ],
)
def test_the_cause_of_a_failed_start(message: str, shown: str) -> None:
    assert cause(message) == shown


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1"),
        ("0.0.0.0", "http://127.0.0.1:80/v1"),
        ("::", "http://[::1]:80/v1"),
        ("fe80::1", "http://[fe80::1]:80/v1"),
    ],
)
def test_the_address_of_a_client(host: str, url: str) -> None:
    assert base_url(host, 80) == url
