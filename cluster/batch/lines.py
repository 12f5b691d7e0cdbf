"""Lines of a batch job, as OpenAI's batch format has them, or plain bodies: what is asked, and what is written.

in:  {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
     {"messages": [...], ...} or {"prompt": ..., ...}, with or without a "custom_id"
out: {"id": ..., "custom_id": ..., "response": {"status_code", "request_id", "body"} or null, "error": null or {...}}

A line without a custom_id of its own, or that cannot be run, also has its number there: "line", from 1.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.http_client import error_of
from router.protocol.errors import echo
from router.protocol.json_entry import parse_object
from router.service import Reply
from workers.api.errors import InvalidRequest, RequestError

Key = tuple[str, str | int]  # ("id", custom_id) or ("line", number): what makes a line the same line

MAX_LINE_BYTES = 9 << 20  # a body of 8 MiB, and its envelope
MAX_ID_CHARACTERS = 512
RECORD_START = b'{"id": "batch_req_'
_ROUTE = re.compile(r"/v1(/[a-z0-9_]+)+")
_ENVELOPE = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Line:
    """A line that can be run."""

    number: int
    custom_id: str | None
    route: str
    body: bytes

    @property
    def key(self) -> Key:
        """Its custom_id, or else its number."""
        return ("line", self.number) if self.custom_id is None else ("id", self.custom_id)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be run, and why."""

    number: int
    custom_id: str | None
    message: str

    @property
    def key(self) -> Key:
        """Its number: its custom_id may be another line's."""
        return ("line", self.number)


def read_lines(source: Iterable[bytes], default_model: str) -> Iterator[Line | BadLine]:
    """The lines of a file but for blank ones; one that names no model gets `default_model`."""
    seen: set[str] = set()
    for number, raw in enumerate(source, start=1):
        if not raw.strip():
            continue
        line = read_line(number, raw, default_model)
        custom_id = line.custom_id
        if isinstance(line, Line) and custom_id is not None:
            if custom_id in seen:
                line = BadLine(number, custom_id, "the same custom_id is on an earlier line")
            seen.add(custom_id)
        yield line


def read_line(number: int, raw: bytes, default_model: str) -> Line | BadLine:
    """One line."""
    custom_id = None
    try:
        value = parse_object(raw.strip(), max_bytes=MAX_LINE_BYTES)
        custom_id = _custom_id(value)
        route, body = _enveloped(value) if value.keys() & {"body", "url", "method"} else _plain(value)
        if body.get("stream"):
            raise InvalidRequest("a batch takes whole answers only: leave out 'stream'")
    except RequestError as e:
        return BadLine(number, custom_id, e.message)
    if "model" not in body:
        body = {"model": default_model, **body}
    return Line(number, custom_id, route, json.dumps(body).encode())


def _custom_id(value: dict[str, Any]) -> str | None:
    custom_id = value.get("custom_id")
    if custom_id is None:
        return None
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARACTERS:
        raise InvalidRequest(f"'custom_id' must be a string of 1 to {MAX_ID_CHARACTERS} characters")
    return custom_id


def _enveloped(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for name in value:
        if name not in _ENVELOPE:
            raise InvalidRequest(f"Unknown parameter: '{echo(name)}'.")
    if value.get("custom_id") is None:
        raise InvalidRequest("Missing required parameter: 'custom_id'.")
    if value.get("method") != "POST":
        raise InvalidRequest("'method' must be \"POST\"")
    url, body = value.get("url"), value.get("body")
    if not isinstance(url, str) or not _ROUTE.fullmatch(url):
        raise InvalidRequest("'url' must be a route such as \"/v1/chat/completions\"")
    if not isinstance(body, dict):
        raise InvalidRequest("'body' must be an object")
    return url, body


def _plain(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if ("prompt" in value) == ("messages" in value):
        raise InvalidRequest("a line needs either 'prompt' or 'messages' (or OpenAI's custom_id, method, url, body)")
    body = {k: v for k, v in value.items() if k != "custom_id"}
    return "/v1/completions" if "prompt" in value else "/v1/chat/completions", body


@dataclass(frozen=True, slots=True)
class Record:
    """An output line. `tokens` are those of the answer; `failed`: there is none."""

    key: Key
    text: bytes
    failed: bool
    tokens: int = 0


def answered(line: Line, reply: Reply) -> Record:
    """The record of an answer, good or bad."""
    try:
        body = json.loads(reply.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        if reply.status == 200:
            return not_answered(line, "invalid_response", "the server's answer is not a JSON object")
        text = reply.body[:500].decode("utf-8", "replace")
        body = {"error": {"message": text, "type": "server_error", "param": None, "code": None}}
    request_id = reply.headers.get("x-request-id") or str(body.get("id") or "")
    response = {"status_code": reply.status, "request_id": request_id, "body": body}
    usage = body.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Record(
        line.key,
        _record(line, response, None),
        failed=reply.status != 200,
        tokens=tokens if isinstance(tokens, int) else 0,
    )


def not_answered(line: Line | BadLine, code: str, message: str) -> Record:
    """The record of a line without an answer."""
    return Record(line.key, _record(line, None, {"code": code, "message": message}), failed=True)


def _record(line: Line | BadLine, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    fields: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if line.key[0] == "line":
        fields["line"] = line.number
    return json.dumps({**fields, "response": response, "error": error}).encode() + b"\n"


def recorded(raw: bytes) -> tuple[Key, bool] | None:
    """Key of a whole output line and whether it failed; None where `raw` is no output line of ours."""
    try:
        record = json.loads(raw)
        if not raw.startswith(RECORD_START) or not record.keys() >= {"id", "custom_id", "response", "error"}:
            return None
        key: Key = ("line", int(record["line"])) if "line" in record else ("id", str(record["custom_id"]))
        response = record["response"]
        return key, response is None or response["status_code"] != 200
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def to_be_retried(reply: Reply) -> bool:
    """Whether the server refused for now: 429, 503, or a proxy's 5xx, which has no error body."""
    return reply.status in (429, 503) or (reply.status >= 500 and error_of(reply.body) is None)


def retry_after(reply: Reply) -> float:
    """Seconds that the server wants us to wait; 0 when it does not say (in seconds)."""
    try:
        return min(max(0.0, float(reply.headers.get("retry-after", "0"))), 3600.0)
    except ValueError:  # a date
        return 0.0
