"""Which request the running code works for: set once at the door, read by log lines and by whoever names things."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from time import monotonic

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # as in the answer's x-request-id

_SHOWN = 36  # characters of it; a step frame carries the name of every sequence


REQUEST_AT: ContextVar[float | None] = ContextVar("request_at", default=None)  # when it came, monotonic seconds


def enter(request_id: str) -> None:
    """The running code works for the request of this id, which came now."""
    REQUEST_ID.set(request_id)
    REQUEST_AT.set(monotonic())


def shown(request_id: str) -> str:
    """As much of it as stands in names."""
    return request_id[:_SHOWN]


def unique_id() -> str:
    """A name that nothing else has, which starts as the request's id does: engines log it."""
    return f"{shown(REQUEST_ID.get())}.{uuid.uuid4().hex[:12]}"
