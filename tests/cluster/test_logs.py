"""Lines of text and of JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from cluster.config import checked_config
from cluster.logs import FORMATS, LEVELS, JsonFormatter, TextFormatter, set_up_logs
from router.request_context import REQUEST_ID
from workers.api.errors import ConfigError

FIELDS = {"owner": "anna b", "ttft_ms": 1.5, "error": None, "note": 'a "quoted"\nline'}


def record(**extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "echelon.x", "levelname": "INFO", "msg": "said %d", "args": (3,), **extra})
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def failure() -> object:
    try:
        raise ValueError("no")
    except ValueError:
        return sys.exc_info()


@pytest.fixture
def request_id() -> Iterator[str]:
    token = REQUEST_ID.set("req-1")
    yield "req-1"
    REQUEST_ID.reset(token)


def test_json_is_one_object_a_line(request_id: str) -> None:
    line = JsonFormatter().format(record(fields=FIELDS, exc_info=failure()))
    assert "\n" not in line
    entry = json.loads(line)
    assert "ValueError: no" in entry.pop("traceback")
    head = {"time": "2023-11-14T22:13:20.250Z", "level": "info", "logger": "echelon.x", "message": "said 3"}
    assert entry == {**head, "request_id": request_id, **FIELDS}


def test_text_is_for_eyes(request_id: str) -> None:
    lines = TextFormatter().format(record(fields=FIELDS, exc_info=failure())).split("\n")
    assert lines[0] == (
        "2023-11-14T22:13:20.250Z INFO echelon.x request=req-1 said 3 "
        'owner="anna b" ttft_ms=1.5 error=- note="a \\"quoted\\"\\nline"'
    )
    assert lines[-1] == "ValueError: no"


def test_no_request_no_id() -> None:
    assert "request" not in json.loads(JsonFormatter().format(record()))
    assert TextFormatter().format(record()) == "2023-11-14T22:13:20.250Z INFO echelon.x said 3"


def test_set_up_twice_logs_once(capfd: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("echelon")
    before = (ours.handlers[:], ours.level, ours.propagate)
    try:
        set_up_logs("info", "text")
        set_up_logs("warning", "json")
        logging.getLogger("echelon.x").info("quiet")
        logging.getLogger("echelon.x").warning("loud")
        assert [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()] == ["loud"]
    finally:
        ours.handlers, ours.level, ours.propagate = before


def test_the_cluster_file_says_which() -> None:
    config = checked_config({"log": {"level": "debug", "format": "json"}}, "file")
    assert (config.replica_config("cpu").log_level, config.replica_config("cpu").log_format) == ("debug", "json")
    for key, values in (("level", LEVELS), ("format", FORMATS)):
        for value in values:
            checked_config({"log": {key: value}}, "file")
        with pytest.raises(ConfigError, match=f"log.{key}"):
            checked_config({"log": {key: "loud"}}, "file")
