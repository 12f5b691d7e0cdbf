"""`echelon serve gradio`: what it refuses, and the pages beside a cluster.

Mutants seen to fail: pages open to the network before a server without keys; a port that is only tried once the cluster
is up.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import web_pages
from cluster.web_command import gradio
from workers.api.errors import ConfigError


@contextlib.contextmanager
def api(status: int) -> Iterator[str]:
    """The URL of a server that answers GET with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "12")
            self.end_headers()
            self.wfile.write(b'{"data": []}')

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def show(url: str, name: str, port: int, no_auth: bool = False) -> None:
    web_pages.show_before_server(url, name=name, port=port, no_auth=no_auth, say=lambda line: None)


def test_who_opens_a_server_without_keys_to_the_network_has_to_say_so(taken: int) -> None:
    with api(200) as url:
        with pytest.raises(ConfigError, match="asks for no key"):
            show(url, "0.0.0.0", taken)
        with pytest.raises(ConfigError, match="cannot listen"):
            show(url, "127.0.0.1", taken)
        with pytest.raises(ConfigError, match="cannot listen"):
            show(url, "0.0.0.0", taken, no_auth=True)
    with pytest.raises(ConfigError, match="asks for no key"):  # nor one that is not there: it may come up without keys
        show("http://127.0.0.1:1", "0.0.0.0", taken)
    with api(401) as url, pytest.raises(ConfigError, match="cannot listen"):
        show(url, "0.0.0.0", taken)


def test_flags_of_a_model_have_no_meaning_for_a_server_that_runs() -> None:
    with pytest.raises(ConfigError, match="runs already"):
        gradio("http://127.0.0.1:1", replicas=2)


def test_a_url_has_to_be_one() -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        show("http://", "127.0.0.1", 0)


def test_a_model_is_not_started_where_the_pages_cannot_be(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(web_pages, "run_until_stopped", lambda *_, **__: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match="cannot listen"):
        gradio("demo", server_port=taken)
    with pytest.raises(ConfigError, match="asks for no key"):
        gradio("demo", server_name="0.0.0.0", server_port=taken)


def test_pages_stand_beside_a_cluster_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(model, flags, *, address, beside):
        with api(200) as url, beside(url, None) as line:
            where = line.split()[2].removesuffix("/chat")
            with urllib.request.urlopen(f"{where}/v1/models", timeout=30) as answer:
                seen.update(model=model, flags=flags, models=json.load(answer))
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{where}/chat", timeout=30)

    monkeypatch.setattr(web_pages, "run_until_stopped", run)
    gradio("demo", server_port=0, replicas=2)
    assert seen == {"model": "demo", "flags": {"replicas": 2}, "models": {"data": []}}
