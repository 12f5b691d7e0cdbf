"""Structured output as requests ask for it, over the demo model: bodies, streams, refusals with their place."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from one_process import EngineGenerator, demo_engine, demo_model

from router.http.app import create_app
from router.http.config import FrontConfig
from router.text.grammars import GrammarChecks
from workers.api.grammar import GrammarKind, GrammarSpec

SCHEMA = {
    "$defs": {"pet": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}},
                      "required": ["name"], "additionalProperties": False}},
    "type": "object",
    "properties": {"pet": {"$ref": "#/$defs/pet"}, "legs": {"type": "array", "items": {"enum": [2, 4]}, "maxItems": 3}},
    "required": ["pet", "legs"],
    "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "pets", "schema": SCHEMA, "strict": True}}


class Status:
    """All is well."""

    def live(self) -> bool:
        return True

    ready = healthy = live


@pytest.fixture(scope="module")
def generator() -> Iterator[EngineGenerator]:
    with demo_engine() as engine:
        made = EngineGenerator(engine)
        yield made
        made.close()


@pytest.fixture
async def client(generator: EngineGenerator) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(FrontConfig(), [demo_model()], generator, Status(), draw_seed=lambda: 5)  # type: ignore
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as one:
        yield one


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    if "prompt" in body:
        return await client.post("/v1/completions", json={"model": "demo", "max_tokens": 99, **body})
    body = {"model": "demo", "max_tokens": 99, "messages": [{"role": "user", "content": "Hi!"}], **body}
    return await client.post("/v1/chat/completions", json=body)


async def texts(client: httpx.AsyncClient, **body: Any) -> list[str]:
    answer = (await ask(client, **body)).json()
    assert "choices" in answer, answer
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    return [choice["text"] if "prompt" in body else choice["message"]["content"] for choice in answer["choices"]]


async def test_a_schema_for_each_choice(client: httpx.AsyncClient) -> None:
    found = await texts(client, response_format=FORMAT, n=3, presence_penalty=0.5, logit_bias={"9": 5})
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(found)) > 1


async def test_a_stream_is_the_same_text_also_after_a_replay(
    client: httpx.AsyncClient, generator: EngineGenerator
) -> None:
    (whole,) = await texts(client, response_format=FORMAT, seed=3)
    for resume_after in (None, 4):
        generator.resume_after = resume_after
        lines = (await ask(client, response_format=FORMAT, seed=3, stream=True)).text.split("\n\n")
        generator.resume_after = None
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == whole
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"json": SCHEMA, "disable_any_whitespace": True}, r'\{"pet":\{"name":".*"\},"legs":\[[24,]*\]\}'),
        ({"json": json.dumps(SCHEMA)}, r"\{.*\}"),
        ({"regex": "[A-F][0-9]{2}"}, "[A-F][0-9]{2}"),
        ({"choice": ['a "b"', "ü\n", "c"]}, 'a "b"|ü\n|c'),
        ({"grammar": 'start: "<" body ">"\nbody: /[a-c]{3}/'}, "<[a-c]{3}>"),
        ({"json_object": True}, r"(?s)\{.*\}"),
    ],
    ids=["json", "text", "regex", "choice", "grammar", "object"],
)
@pytest.mark.parametrize("route", ["chat", "completion"])
async def test_every_kind(client: httpx.AsyncClient, route: str, outputs: dict[str, Any], pattern: str) -> None:
    import re

    (text,) = await texts(client, structured_outputs=outputs, **({"prompt": "So"} if route == "completion" else {}))
    assert re.fullmatch(pattern, text)
    if "json" in outputs or "json_object" in outputs:
        assert isinstance(json.loads(text), dict)


async def test_stop_strings_and_limits_still_cut(client: httpx.AsyncClient) -> None:
    body = (await ask(client, response_format=FORMAT, stop=["pet"])).json()["choices"][0]
    assert (body["finish_reason"], body["message"]["content"].strip(' {"')) == ("stop", "")
    cut = (await ask(client, response_format=FORMAT, max_tokens=5)).json()["choices"][0]
    assert cut["finish_reason"] == "length"


BAD = {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=a)"}]}}}
UNKNOWN = {"properties": {"b": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"items": {"not": {}}}}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}},
         "response_format.json_schema.schema.properties.a.anyOf[1]", "look-ahead"),
        ({"structured_outputs": {"json": UNKNOWN}}, "structured_outputs.json.properties.b", "not"),
        ({"structured_outputs": {"json": "[1"}}, "structured_outputs.json", "schema"),
        ({"structured_outputs": {"json": "true"}}, "structured_outputs.json", "schema"),
        ({"structured_outputs": {"json": '{"items":' * 9000 + "{}" + "}" * 9000}}, "structured_outputs.json", "deeply"),
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"regex": "a{1000000}"}}, "structured_outputs.regex", "too"),
        ({"structured_outputs": {"grammar": "start: nobody"}}, "structured_outputs.grammar", "nobody"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exclude"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs", "exclude"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [3]}, "allowed_token_ids", "exclude"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "Unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "Missing"),
        ({"response_format": {"type": "text", "json_schema": FORMAT["json_schema"]}},
         "response_format.json_schema", "json_schema"),
    ],
    ids=range(15),
)  # fmt: skip
async def test_refusals_name_their_place(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    answer = await ask(client, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


async def test_text_is_no_grammar(client: httpx.AsyncClient, generator: EngineGenerator) -> None:
    assert (await ask(client, response_format={"type": "text"}, max_tokens=3)).status_code == 200
    assert generator.requests[-1].grammar is None


def test_a_grammar_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, spec = GrammarChecks(), GrammarSpec(GrammarKind.REGEX, "a(b")
    first = checks.fault(spec)
    monkeypatch.setattr("router.text.grammars._look", None)
    assert checks.fault(spec) is first is not None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_a_call_that_is_required_on_every_api(client: httpx.AsyncClient, path: str, stream: bool) -> None:
    """Both ways, by any function and by name: calls that obey the schema, whatever the model knows of tools."""
    function = {"name": "pets", "description": "d", "parameters": SCHEMA}
    hi = [{"role": "user", "content": "Hi!"}]
    bodies: dict[str, tuple[dict[str, Any], list[Any]]] = {
        "/v1/chat/completions": (
            {"messages": hi, "tools": [{"type": "function", "function": function}]},
            ["required", {"type": "function", "function": {"name": "pets"}}],
        ),
        "/v1/responses": (
            {"input": hi, "tools": [{"type": "function", **function}]},
            ["required", {"type": "function", "name": "pets"}],
        ),
        "/v1/messages": (
            {"messages": hi, "tools": [{"name": "pets", "input_schema": SCHEMA}]},
            [{"type": "any"}, {"type": "tool", "name": "pets"}],
        ),
    }
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body, choices = bodies[path]
    for choice in choices:
        asked = {"model": "demo", limit: 160, "stream": stream, "tool_choice": choice, **body}
        answer = await client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        calls = streamed_calls(path, answer.text) if stream else whole_calls(path, answer.json())
        assert calls
        for name, arguments in calls:
            assert name == "pets"
            jsonschema.validate(json.loads(arguments), SCHEMA)


def whole_calls(path: str, answer: Any) -> list[tuple[str, str]]:
    if path == "/v1/responses":
        assert answer["status"] == "completed"
        return [(item["name"], item["arguments"]) for item in answer["output"]]
    if path == "/v1/messages":
        assert answer["stop_reason"] == "tool_use"
        return [(block["name"], json.dumps(block["input"])) for block in answer["content"]]
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    return [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]


def streamed_calls(path: str, text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        kind = event.get("type", "")
        deltas = [] if kind else [c for choice in event["choices"] for c in choice["delta"].get("tool_calls", ())]
        begun = event.get("item" if kind == "response.output_item.added" else "content_block", {}).get("name")
        more = event["delta"] if kind.startswith("response.function_call_arguments.delta") else ""
        if kind == "content_block_delta":
            more = event["delta"]["partial_json"]
        for delta in deltas:
            begun, more = delta["function"].get("name"), delta["function"]["arguments"]
        if begun:
            found.append((begun, ""))
        if more:
            found[-1] = (found[-1][0], found[-1][1] + more)
    return found
