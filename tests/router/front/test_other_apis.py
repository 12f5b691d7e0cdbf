"""/v1/messages and /v1/responses: what their official clients read, and what is refused."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from workers.api.errors import NotAuthorized, ReplicaLost

from .fakes import ANSWER, FakeGenerator, FakeStatus

MESSAGES, RESPONSES, COUNT = "/v1/messages", "/v1/responses", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]
ASKED = {"model": "m", "max_tokens": 100, "messages": HI}


def events_of(text):
    """Data of the events; each is named as its type is."""
    found = []
    for event in text.split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_a_message(client, generator):
    generator.cached = 2
    answer = (await client.post(MESSAGES, json=ASKED)).json()
    assert answer["content"] == [{"type": "text", "text": ANSWER}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "m")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    (request,) = generator.requests
    assert request.route == MESSAGES
    assert answer["usage"]["input_tokens"] == len(request.prompt_ids) - 2
    assert answer["usage"]["cache_read_input_tokens"] == 2
    short = (await client.post(MESSAGES, json=ASKED | {"max_tokens": 2})).json()
    assert short["stop_reason"] == "max_tokens"
    stopped = (await client.post(MESSAGES, json=ASKED | {"stop_sequences": ["zz", "The"]})).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "The")
    assert stopped["content"][0]["text"] == ANSWER.split("The")[0]


async def test_a_message_streams_in_the_documented_order(client):
    whole = (await client.post(MESSAGES, json=ASKED | {"stop_sequences": ["The"]})).json()
    answer = await client.post(MESSAGES, json=ASKED | {"stop_sequences": ["The"], "stream": True})
    start, block, *deltas, end_block, end, stop = events_of(answer.text)
    assert (start["type"], block["type"], end_block["type"]) == (
        "message_start",
        "content_block_start",
        "content_block_stop",
    )
    assert (start["message"]["content"], start["message"]["usage"]["output_tokens"]) == ([], 0)
    assert {d["type"] for d in deltas} == {"content_block_delta"}
    assert "".join(d["delta"]["text"] for d in deltas) == whole["content"][0]["text"]
    assert end["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "The"}
    assert end["usage"] == whole["usage"]
    assert stop == {"type": "message_stop"}


async def test_turns_of_one_role_are_one_and_the_last_of_the_assistants_goes_on(client, generator):
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    said = [{"role": "user", "content": parts}, HI[0], {"role": "assistant", "content": "It is"}]
    await client.post(MESSAGES, json=ASKED | {"messages": said, "system": "Be short.", "metadata": {"user_id": "u7"}})
    plain = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a\nb\nhi"},
        {"role": "assistant", "content": "It is"},
    ]
    await client.post("/v1/chat/completions", json={"model": "m", "messages": plain, "continue_final_message": True})
    first, second = generator.requests
    assert first.prompt_ids == second.prompt_ids
    assert first.sub == "u7"
    counted = await client.post(COUNT, json={"model": "m", "messages": said, "system": "Be short."})
    assert counted.json() == {"input_tokens": len(first.prompt_ids)}


@pytest.mark.parametrize(
    ("change", "status", "kind", "says"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "'user', 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "image"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "thinking"),
        ({"container": "x"}, 400, "invalid_request_error", "container"),
        ({"foo": 1}, 400, "invalid_request_error", "foo"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ({"messages": [{"role": "user", "content": "x y" * 999}]}, 400, "invalid_request_error", "maximum context"),
        ({"model": "nope"}, 404, "not_found_error", "nope"),
        ({"model": "org/base"}, 404, "not_found_error", "not a chat model"),
    ],
    ids=str,
)
async def test_refusals_look_as_anthropics(client, change, status, kind, says):
    answer = await client.post(MESSAGES, json=ASKED | change)
    assert (answer.status_code, answer.json()["type"]) == (status, "error")
    error = answer.json()["error"]
    assert error["type"] == kind
    assert says in error["message"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert (await client.post(MESSAGES, content=b"{")).json()["type"] == "error"
    assert (await client.get(MESSAGES)).status_code == 405
    assert (await client.post(MESSAGES, json=ASKED)).json()["content"][0]["text"] == ANSWER


async def test_a_stream_that_breaks_ends_with_its_error(client, generator):
    generator.failure = ReplicaLost("gone")
    for path, body in ((MESSAGES, ASKED), (RESPONSES, {"model": "m", "input": "hi"})):
        answer = await client.post(path, json=body | {"stream": True})
        last = events_of(answer.text)[-1]
        assert last["type"] == "error"
        assert "gone" in str(last)


async def test_the_key_comes_in_a_header_of_its_own(tokenizer):
    class Keys:
        def resolve(self, headers, client):
            keys = headers.getlist("authorization")
            if keys != ["Bearer good"]:
                raise NotAuthorized("No key.")
            return Identity("anna", "gold")

    models = [ServedModel("m", tokenizer, 256)]
    app = create_app(FrontConfig(), models, FakeGenerator(tokenizer), FakeStatus(), identity=Keys())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as c:

        async def status(path, *headers):
            return (await c.post(path, json=ASKED, headers=list(headers))).status_code

        good, bad = ("x-api-key", "good"), ("x-api-key", "bad")
        assert await status(MESSAGES, good) == 200
        assert await status(MESSAGES, ("authorization", "Bearer good"), bad) == 200
        assert [await status(MESSAGES, *h) for h in ((), (bad,), (good, bad), (good, good))] == [401] * 4
        assert await status(MESSAGES, ("authorization", "Bearer bad"), good) == 401
        assert await status("/v1/chat/completions", good) == 401
        refused = await c.post(MESSAGES, json=ASKED)
        assert refused.json()["error"]["type"] == "authentication_error"


@pytest.fixture
async def ai(app):
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")
    async with openai.AsyncOpenAI(base_url="http://front/v1", api_key="k", max_retries=0, http_client=transport) as c:
        yield c


async def test_openais_client_reads_responses(ai, generator):
    whole = await ai.responses.create(model="m", input="hi", instructions="Be short.", metadata={"a": "b"})
    assert (whole.output_text, whole.status, whole.store) == (ANSWER, "completed", False)
    assert whole.usage.input_tokens == len(generator.requests[0].prompt_ids)
    async with ai.responses.stream(model="m", input="hi") as stream:
        events = [e async for e in stream]
        final = await stream.get_final_response()
    assert final.output_text == ANSWER
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events if e.type != "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    again = [{"role": "user", "content": "hi"}, *[o.model_dump() for o in whole.output], HI[0]]
    assert (await ai.responses.create(model="m", input=again)).output_text == ANSWER
    short = await ai.responses.create(model="m", input="hi", max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].call_id"),
        ({"input": [{"type": "mcp_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "x y" * 999}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 300}, "input"),
        ({"n": 2}, "n"),
    ],
    ids=str,
)
async def test_responses_refuse_by_name(client, change, param):
    answer = await client.post(RESPONSES, json={"model": "m", "input": "hi", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
