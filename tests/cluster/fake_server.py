"""A small OpenAI-compatible server in this process; run as a program it serves until it is killed.

Answers depend on the request alone. Tests may script refusals, hold answers back, and read what was asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Refusal = tuple[int, dict[str, str], bytes]


def answer_to(body: dict[str, Any]) -> str:
    """What the server says to `body`."""
    asked = json.dumps(body.get("messages", body.get("prompt")), sort_keys=True)
    return f"answer {hashlib.sha256(asked.encode()).hexdigest()[:8]}"


class FakeServer:
    """`refuse(body, times_asked)` may give a refusal; `delay` is in seconds; `gate`, when cleared, holds answers."""

    def __init__(self) -> None:
        self.refuse: Callable[[dict[str, Any], int], Refusal | None] = lambda body, times: None
        self.delay = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self.dropped = 0  # connections cut before their answer
        self.left = 0  # streams whose reader went away
        self.say: Callable[[dict[str, Any]], list[str]] = lambda body: [answer_to(body)]
        self._at_once = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path != "/v1/models":
                    return self.reply(404, {}, b'{"error": {"message": "no such route"}}')
                return self.reply(200, {}, json.dumps({"data": [{"id": "fake"}, {"id": "other"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.run(self, body)

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), "x-request-id": "req-1", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a client that was killed

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()

    def run(self, handler: Any, body: dict[str, Any]) -> None:
        """One POST."""
        asked = json.dumps(body, sort_keys=True)
        with self._lock:
            self.asked[asked] += 1
            times = self.asked[asked]
            self.bodies.append(body)
            self.keys.add(handler.headers.get("authorization"))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.delay:
                time.sleep(self.delay)
            self.gate.wait()
            refusal = self.refuse(body, times)
            if refusal is not None and refusal[0] == 0:  # cut the connection
                self.dropped += 1
                handler.close_connection = True
                return
            if refusal is not None:
                handler.reply(*refusal)
            elif body.get("stream"):
                self._stream(handler, body)
            else:
                handler.reply(200, {}, self._whole(handler.path, body))
        except (BrokenPipeError, ConnectionResetError):
            self.left += 1
        finally:
            with self._lock:
                self._at_once -= 1

    def _whole(self, path: str, body: dict[str, Any]) -> bytes:
        text = "".join(self.say(body))
        message = {"message": {"role": "assistant", "content": text}} if path.endswith("/chat/completions") else {}
        choice = {"index": 0, "finish_reason": "stop", **(message or {"text": text})}
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        return json.dumps({"id": "cmpl-1", "model": body["model"], "choices": [choice], "usage": usage}).encode()

    def _stream(self, handler: Any, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        for piece in self.say(body):
            self.gate.wait()
            delta = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            handler.wfile.write(b"data: " + json.dumps(delta).encode() + b"\n\n")
        handler.wfile.write(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n')
        handler.wfile.write(b"data: [DONE]\n\n")
