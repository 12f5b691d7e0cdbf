"""Server-sent events. An event is one `data:` line of ASCII JSON: no reader of lines finds another line end in it."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
DONE = "data: [DONE]\n\n"

dumps = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode
quoted = encode_basestring_ascii  # what `dumps` does with a string, without its questions


def event(data: str) -> str:
    """`data` (one line of JSON) as an event."""
    return f"data: {data}\n\n"


def error_event(body: bytes) -> str:
    """The last event of a stream that failed; `[DONE]` must not follow it."""
    return event(body.decode("ascii"))
