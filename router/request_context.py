"""Which request the running code works for: set once at the door, read by log lines and by whoever names things."""

from __future__ import annotations

import uuid
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # as in the answer's x-request-id

_SHOWN = 36  # characters of it; a step frame carries the name of every sequence


def unique_id() -> str:
    """A name that nothing else has, which starts as the request's id does: engines log it."""
    return f"{REQUEST_ID.get()[:_SHOWN]}.{uuid.uuid4().hex[:12]}"
