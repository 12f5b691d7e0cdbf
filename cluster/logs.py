"""How our processes log: lines of text or of JSON on stderr, which Ray keeps in a file for each process."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from router.request_context import REQUEST_ID

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


class TextFormatter(logging.Formatter):
    """`2026-11-22T01:02:03.456Z INFO echelon.http request=ID message key=value ...`, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or some where there is a traceback."""
        request_id = REQUEST_ID.get()
        head = f"{_time(record)} {record.levelname} {record.name}"
        parts = [head, *([f"request={request_id}"] if request_id else []), record.getMessage()]
        parts += [f"{name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id where there is one, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Exactly one line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up_logs(level: str, form: str) -> None:
    """Our loggers write to stderr, from `level` (one of LEVELS) on, as `form` (one of FORMATS). Again changes them."""
    handler = logging.StreamHandler(sys.__stderr__)  # Serve puts a logger of its own in place of sys.stderr
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    ours = logging.getLogger("echelon")
    for old in ours.handlers[:]:
        ours.removeHandler(old)
    ours.addHandler(handler)
    ours.setLevel(level.upper())
    ours.propagate = False


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return json.dumps(text) if not text or any(c.isspace() or c in '"=' or not c.isprintable() for c in text) else text
