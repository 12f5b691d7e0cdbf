"""One line for each request, whatever its end, and nothing of its text."""

from __future__ import annotations

import logging

import pytest

from router.request_context import REQUEST_ID
from workers.api.errors import Overloaded

BODY = {"model": "m", "messages": [{"role": "user", "content": "my secret is 4711"}], "max_tokens": 5}
HEADERS = {"x-request-id": "abc-1", "authorization": "Bearer sk-key"}


class Lines(logging.Handler):
    """What was logged: (message, request id at that moment, fields)."""

    def __init__(self):
        super().__init__()
        self.lines = []
        self.everything = []

    def emit(self, record):
        self.everything.append(f"{record.getMessage()} {getattr(record, 'fields', '')}")
        if record.name == "echelon.requests":
            self.lines.append((record.getMessage(), REQUEST_ID.get(), record.fields))


@pytest.fixture
def log():
    handler = Lines()
    logger = logging.getLogger("echelon")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request(client, generator, log, stream):
    generator.cached = 3
    await client.post("/v1/chat/completions", json=BODY | {"stream": stream}, headers=HEADERS)
    ((message, request_id, fields),) = log.lines
    assert (message, request_id) == ("request finished", "abc-1")
    request = generator.requests[0]
    expected = {
        "owner": "default",
        "tier": "",
        "route": "/v1/chat/completions",
        "model": "m",
        "replica": "",
        "replays": 0,
        "prompt_tokens": len(request.prompt_ids),
        "cached_tokens": 3,
        "output_tokens": 5,
        "finish_reason": "length",
        "error": None,
    }
    assert {k: fields[k] for k in expected} == expected
    assert 0 <= fields["queue_ms"] <= fields["ttft_ms"] <= fields["e2e_ms"]
    assert request.id.startswith("abc-1.")  # engines log it
    assert not any("4711" in line or "sk-key" in line for line in log.everything)


async def test_what_the_generator_tells_is_in_the_line(client, generator, log):
    generator.trace = {"replica": "r7", "queue_seconds": 0.25, "replays": 1}
    await client.post("/v1/chat/completions", json=BODY)
    ((_, request_id, fields),) = log.lines
    assert (fields["replica"], fields["queue_ms"], fields["replays"]) == ("r7", 250.0, 1)
    assert request_id.startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
async def test_refused_and_failed_requests_have_their_code(client, generator, log, stream):
    body = BODY | {"stream": stream}
    await client.post("/v1/chat/completions", json=body | {"temperature": 9}, headers=HEADERS)
    generator.refusal = Overloaded("full")
    await client.post("/v1/chat/completions", json=body)
    generator.refusal, generator.failure = None, RuntimeError("my secret is 4711")
    await client.post("/v1/chat/completions", json=body)
    messages = [(message, fields.get("finish_reason"), fields["error"]) for message, _, fields in log.lines]
    assert messages[0][0] == "request refused"
    assert messages[0][2]
    assert messages[1:] == [
        ("request finished", None, "rate_limit_exceeded"),
        ("request finished", None, "server_error"),
    ]
    assert log.lines[0][1] == "abc-1"


async def test_two_requests_with_one_id_are_two_to_the_engine(client, generator):
    for _ in range(2):
        await client.post("/v1/completions", json={"model": "m", "prompt": ["a", "b"]}, headers=HEADERS)
    assert len({r.id for r in generator.requests}) == 4
