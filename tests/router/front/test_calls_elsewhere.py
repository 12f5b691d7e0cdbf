"""Functions, thoughts and structured output on /v1/responses and /v1/messages: one core with chats, other shapes."""

from __future__ import annotations

import json

import httpx
import openai
import pydantic
import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.protocol.message_events import called_with
from router.protocol.responses import ResponsesBody
from router.protocol.validation import validate
from router.text.tokenizer import Tokenizer

from .fakes import TOOLS_TEMPLATE
from .test_other_apis import COUNT, HI, MESSAGES, RESPONSES, events_of
from .test_tools import CALL, TIME, WEATHER

SCHEMA = WEATHER["function"]["parameters"]
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
TOOLS = [
    {"name": "weather", "description": "It knows.", "input_schema": SCHEMA},
    {"name": "time", "input_schema": {"type": "object"}},
]
ASKED = {
    MESSAGES: {"model": "m", "max_tokens": 400, "messages": HI, "tools": TOOLS},
    RESPONSES: {"model": "m", "max_output_tokens": 400, "input": "hi", "tools": FUNCTIONS},
}
TWO = '[{"name":"weather","parameters":{"city":"Rom"}},{"name":"time","parameters":{}}]'
THOUGHT = "<think>\nHm, well.\n</think>\n\nLet me see.\n" + CALL
SWITCHED = TOOLS_TEMPLATE + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
SWITCHED += "{{ reasoning_effort | default('') }}"


async def ask(client, path, **body):
    async with client:
        return await client.post(path, json={**ASKED[path], **body})


async def answer_of(client, path, *, stream, **body):
    """The whole answer; a stream's is put together from its deltas, and must be what its last events say."""
    answer = await ask(client, path, stream=stream, **body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json()
    return (response_of if path == RESPONSES else message_of)(events_of(answer.text))


def message_of(events):
    """As Anthropic's clients do it."""
    message, partial = events[0]["message"], {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"]) == len(partial)
            message["content"].append(event["content_block"])
            partial[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            assert event["index"] in partial
            if delta["type"] == "input_json_delta":
                partial[event["index"]] += delta["partial_json"]
            elif delta["type"] == "signature_delta":
                block["signature"] += delta["signature"]
            else:
                kind = delta["type"].removesuffix("_delta")
                assert kind == block["type"]
                block[kind] += delta[kind]
        elif event["type"] == "content_block_stop":
            if text := partial[event["index"]]:
                message["content"][event["index"]]["input"] = json.loads(text)
            assert event["index"] == len(message["content"]) - 1
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    assert events[-1]["type"] == "message_stop"
    return message


def response_of(events):
    """The last event's, after a check that its items are what all others said of them."""
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    items, open_item = [], None
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert (open_item, event["output_index"], event["item"]["status"]) == (None, len(items), "in_progress")
            open_item = event["item"]
        elif kind == "response.content_part.added":
            open_item["content"].append(event["part"])
        elif kind == "response.function_call_arguments.delta":
            open_item["arguments"] += event["delta"]
        elif kind.endswith("text.delta"):
            assert kind == f"response.{open_item['content'][0]['type']}.delta"
            open_item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (open_item["arguments"], open_item["name"])
        elif kind == "response.content_part.done":
            assert event["part"] == open_item["content"][0]
        elif kind == "response.output_item.done":
            assert event["item"] == open_item | {"status": event["item"]["status"]}
            items.append(event["item"])
            open_item = None
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (open_item["id"], len(items))
    assert open_item is None
    assert events[-1]["response"]["output"] == items
    return events[-1]["response"]


def parts_of(path, answer):
    """What an answer of either has, in the same words: (kind, text), calls as (name, arguments)."""
    found = []
    for item in answer["content"] if path == MESSAGES else answer["output"]:
        if item["type"] in ("function_call", "tool_use"):
            arguments = item["input"] if path == MESSAGES else json.loads(item["arguments"])
            found.append((item["name"], arguments))
        elif path == MESSAGES:
            found.append((item["type"], item[item["type"]]))
        else:
            found.append(({"reasoning": "thinking"}.get(item["type"], "text"), item["content"][0]["text"]))
    return found


BOTH = pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
EITHER = pytest.mark.parametrize("stream", [False, True])


@BOTH
@EITHER
async def test_thoughts_text_and_a_call(tools_client, generator, path, stream):
    generator.answer = THOUGHT
    answer = await answer_of(tools_client(reasoning_parser="qwen3"), path, stream=stream)
    assert parts_of(path, answer) == [
        ("thinking", "Hm, well."),
        ("text", "Let me see."),
        ("weather", {"city": "Oslo"}),
    ]
    assert generator.requests[-1].grammar is None
    if path == MESSAGES:
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
        assert answer["content"][0]["signature"] == ""
    else:
        assert (answer["status"], answer["output"][1]["status"]) == ("completed", "completed")
        thoughts = len(generator.tokenizer.encode(THOUGHT.split("</think>", maxsplit=1)[0]))
        details = answer["usage"]["output_tokens_details"]
        assert 0 < details["reasoning_tokens"] <= thoughts
        assert (answer["tool_choice"], [tool["name"] for tool in answer["tools"]]) == ("auto", ["weather", "time"])


@BOTH
async def test_the_order_of_a_streams_events(tools_client, generator, path):
    generator.answer = THOUGHT
    events = events_of((await ask(tools_client(reasoning_parser="qwen3"), path, stream=True)).text)
    kinds = [e["type"] for e in events]
    once = [kind for i, kind in enumerate(kinds) if not kind.endswith("delta") or kind != kinds[i - 1]]
    if path == MESSAGES:
        start, delta, stop = (f"content_block_{part}" for part in ("start", "delta", "stop"))
        assert once == ["message_start", *3 * [start, delta, stop], "message_delta", "message_stop"]
        assert [e["delta"]["type"] for e in events if e["type"] == delta and e["index"] == 0][-1] == "signature_delta"
        return
    part = ("response.content_part.added", "response.{}.delta", "response.{}.done", "response.content_part.done")
    added, done = "response.output_item.added", "response.output_item.done"
    assert once == [
        *("response.created", "response.in_progress"),
        *(added, *(kind.format("reasoning_text") for kind in part), done),
        *(added, *(kind.format("output_text") for kind in part), done),
        *(added, *(kind.format("function_call_arguments") for kind in part[1:3]), done),
        "response.completed",
    ]


@BOTH
@EITHER
async def test_a_required_call_is_enforced_and_read(tools_client, generator, path, stream):
    generator.answer = TWO
    choice = {"type": "any"} if path == MESSAGES else "required"
    answer = await answer_of(tools_client(tool_parser=None), path, stream=stream, tool_choice=choice)
    assert parts_of(path, answer) == [("weather", {"city": "Rom"}), ("time", {})]
    schema = json.loads(generator.requests[-1].grammar.source)
    assert schema["$defs"]["tool0"]["required"] == ["city"]
    assert "maxItems" not in schema
    single = (
        {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        if path == MESSAGES
        else {"tool_choice": choice, "parallel_tool_calls": False}
    )
    one = await answer_of(tools_client(tool_parser=None), path, stream=stream, **single)
    assert parts_of(path, one) == [("weather", {"city": "Rom"})]
    assert json.loads(generator.requests[-1].grammar.source)["maxItems"] == 1


@BOTH
@EITHER
async def test_a_named_call_is_enforced_and_read(tools_client, generator, path, stream):
    generator.answer = '{"city":"Rom"}'
    choice = {"type": "tool" if path == MESSAGES else "function", "name": "weather"}
    answer = await answer_of(tools_client(), path, stream=stream, tool_choice=choice)
    assert parts_of(path, answer) == [("weather", {"city": "Rom"})]
    assert json.loads(generator.requests[-1].grammar.source)["required"] == ["city"]
    if path == RESPONSES:
        assert answer["tool_choice"] == choice


@BOTH
async def test_no_call_is_wanted(tools_client, generator, tokenizer, path):
    generator.answer = CALL
    choice = {"type": "none"} if path == MESSAGES else "none"
    answer = await answer_of(tools_client(), path, stream=False, tool_choice=choice)
    assert parts_of(path, answer) == [("text", CALL)]
    assert "weather" not in tokenizer.decode(generator.requests[-1].prompt_ids)


@BOTH
@EITHER
async def test_an_answer_that_is_cut_in_a_call(tools_client, generator, path, stream):
    generator.answer = '{"city":"Ro'
    short = {"max_tokens" if path == MESSAGES else "max_output_tokens": len(generator.tokenizer.encode('{"city":"R'))}
    choice = {"type": "tool" if path == MESSAGES else "function", "name": "weather"}
    answer = await ask(tools_client(), path, stream=stream, tool_choice=choice, **short)
    if path == RESPONSES:
        answer = response_of(events_of(answer.text)) if stream else answer.json()
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (answer["output"][0]["arguments"], answer["output"][0]["status"]) == ('{"city":"R', "incomplete")
    elif stream:
        assert '"stop_reason":"max_tokens"' in answer.text
    else:
        assert (answer.json()["stop_reason"], answer.json()["content"][0]["input"]) == ("max_tokens", {"city": "R"})


def test_arguments_are_an_object_whatever_the_model_wrote():
    cases = {'{"a": [1, {"b": "x': {"a": [1, {"b": "x"}]}, "": {}, '{"a": 1}': {"a": 1}}
    for text, value in cases.items():
        assert called_with(text) == value
    for text in (
        "[1]",
        "{'a': 1}",
        '{"a": NaN}',
        '{"a": 1} x',
        '{"a": 1e999}',
        '{"a": ' + "1" * 5000 + "}",
        "[" * 9999,
    ):
        assert called_with(text) == {"INVALID_JSON": text}


CALLED = {"name": "weather", "call_id": "call_1", "arguments": '{"city": "Oslo"}', "type": "function_call"}
USED = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}


@BOTH
async def test_what_is_sent_back_is_the_same_chat(tools_client, generator, path):
    template = TOOLS_TEMPLATE.replace(
        "|{{ message.content }}", "|{{ message.reasoning_content }}|{{ message.content }}"
    )
    client = tools_client(template=template)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "warm\ndry"},
        {"role": "user", "content": "And now?"},
    ]
    texts = [{"type": "text", "text": "warm"}, {"type": "text", "text": "dry"}]
    if path == MESSAGES:
        thinking = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": texts, "is_error": False}
        body = {
            "messages": [
                chat[0],
                {"role": "assistant", "content": [thinking, {"type": "text", "text": "I look."}, USED]},
                {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
            ]
        }
    else:
        thinking = {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "Hm."}]}
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
        output = [{"type": "input_text", "text": part["text"]} for part in texts]
        result = {"type": "function_call_output", "call_id": "call_1", "output": output}
        body = {"input": [chat[0], thinking | {"summary": []}, said, CALLED | {"id": "fc_1"}, result, chat[3]]}
    async with client:
        assert (await client.post(path, json={**ASKED[path], **body})).status_code == 200
        tools = [WEATHER | {"function": {**WEATHER["function"], "description": "It knows."}}, TIME]
        tools = [{"type": "function", "function": {**TIME["function"], "parameters": {"type": "object"}}}, tools[0]][
            ::-1
        ]
        tools = tools if path == MESSAGES else [WEATHER, TIME]
        plain = await client.post("/v1/chat/completions", json={"model": "m", "messages": chat, "tools": tools})
        assert plain.status_code == 200
        ours, theirs = generator.requests
        assert ours.prompt_ids == theirs.prompt_ids
        if path == MESSAGES:
            counted = await client.post(COUNT, json={"model": "m", "tools": TOOLS, **body})
            assert counted.json() == {"input_tokens": len(ours.prompt_ids)}


async def test_items_without_text_make_messages_of_their_own():
    items = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}]},
        CALLED,
        CALLED | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "x"},
        {"type": "function_call_output", "call_id": "call_2", "output": ""},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "b"}], "summary": []},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"type": "reasoning"},
    ]
    said = validate(ResponsesBody, {"model": "m", "input": items}).chat.messages
    shown = [(m.role, m.content, m.reasoning_content, [c.id for c in m.tool_calls or ()], m.tool_call_id) for m in said]
    assert shown == [
        ("assistant", "", "a", ["call_1", "call_2"], None),
        ("tool", "x", None, [], "call_1"),
        ("tool", "", None, [], "call_2"),
        ("assistant", "c", "b", [], None),
        ("assistant", "d", None, [], None),
    ]


@BOTH
async def test_a_schema_is_enforced(tools_client, generator, path):
    client, schema = (
        tools_client(reasoning_parser="qwen3"),
        {"type": "object", "properties": {"a": {"type": "integer"}}},
    )
    generator.answer = '<think>x</think>{"a":1}'
    if path == MESSAGES:
        more = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    else:
        more = {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}}
    answer = await answer_of(client, path, stream=False, tools=[], **more)
    assert parts_of(path, answer) == [("thinking", "x"), ("text", '{"a":1}')]
    grammar = generator.requests[-1].grammar
    assert (json.loads(grammar.source), grammar.begins_after) == (schema, "</think>")
    if path == RESPONSES:
        assert answer["text"]["format"] == more["text"]["format"] | {"description": None}
        await answer_of(tools_client(), path, stream=False, text={"format": {"type": "json_object"}})
        assert generator.requests[-1].grammar.source == '{"type": "object"}'


async def test_thinking_is_switched_where_the_template_reads_it(tools_client, generator, tokenizer):
    async def prompt(path, *, parser="qwen3", template=SWITCHED, **body):
        answer = await ask(tools_client(template=template, reasoning_parser=parser), path, **body)
        if answer.status_code != 200:
            error = answer.json()["error"]
            return error.get("param") or error["message"].split("'")[1]
        return tokenizer.decode(generator.requests[-1].prompt_ids).partition("|hi")[2]

    on = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1025}
    off, adaptive = {"thinking": {"type": "disabled"}}, {"thinking": {"type": "adaptive"}}
    assert [await prompt(MESSAGES, **body) for body in (on, off, adaptive, {})] == ["True", "False", "", ""]
    assert await prompt(MESSAGES, **adaptive, output_config={"effort": "low"}) == "low"
    assert await prompt(RESPONSES, reasoning={"effort": "high"}) == "high"
    assert await prompt(RESPONSES, reasoning={"effort": "none", "summary": None}) == "False"
    plain = {"template": TOOLS_TEMPLATE}
    assert await prompt(MESSAGES, **plain, **on) == ""  # it thinks anyway
    assert await prompt(MESSAGES, **plain, **off) == "thinking"
    assert await prompt(MESSAGES, **plain, parser=None, **off) == ""  # it does not think anyway
    assert await prompt(MESSAGES, **plain, parser=None, **on) == "thinking"
    assert await prompt(MESSAGES, **plain, output_config={"effort": "low"}) == "output_config.effort"
    assert await prompt(RESPONSES, **plain, reasoning={"effort": "low"}) == "reasoning.effort"
    assert await prompt(RESPONSES, **plain, reasoning={"effort": "none"}) == "reasoning.effort"


async def test_a_word_of_the_templates_ends_a_turn(model_folder, generator, status, tokenizer):
    generator.tokenizer = tokenizer
    served = Tokenizer.from_folder(model_folder, trust_template=True)
    served.stop_words = ("END",)
    generator.answer = "Done. END of it"
    app = create_app(FrontConfig(), [ServedModel("m", served, 256)], generator, status)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        body = {"model": "m", "max_tokens": 99, "messages": HI}
        for stops, reason in (([], ("end_turn", None)), (["of", "D"], ("stop_sequence", "D"))):
            answer = (await client.post(MESSAGES, json={**body, "stop_sequences": stops})).json()
            assert (answer["stop_reason"], answer["stop_sequence"]) == reason


class City(pydantic.BaseModel):
    name: str
    people: int


async def test_openais_client_parses(tools_client, generator):
    async with openai.AsyncOpenAI(base_url="http://x/v1", api_key="k", max_retries=0, http_client=tools_client()) as ai:
        asked = {"model": "m", "input": "hi"}
        generator.answer = '{"name":"Oslo","people":700000}'
        parsed = await ai.responses.parse(**asked, text_format=City)
        assert parsed.output_parsed == City(name="Oslo", people=700000)
        async with ai.responses.stream(**asked, text_format=City) as stream:
            assert (await stream.get_final_response()).output_parsed == City(name="Oslo", people=700000)
        generator.answer = TWO
        tools = [{**function, "strict": True} for function in FUNCTIONS]
        whole = await ai.responses.create(**asked, tools=tools, tool_choice="required")
        async with ai.responses.stream(**asked, tools=tools, tool_choice="required") as stream:
            snapshots = [e.snapshot async for e in stream if e.type == "response.function_call_arguments.delta"]
            streamed = await stream.get_final_response()
        assert [(c.name, c.parsed_arguments) for c in streamed.output] == [("weather", {"city": "Rom"}), ("time", {})]
        assert [(c.name, c.arguments) for c in whole.output] == [("weather", '{"city":"Rom"}'), ("time", "{}")]
        assert snapshots[-1] == "{}"
        results = [{"type": "function_call_output", "call_id": c.call_id, "output": "warm"} for c in whole.output]
        generator.answer = "It is warm."
        again = [HI[0], *[item.model_dump() for item in whole.output], *results]
        assert (await ai.responses.create(model="m", input=again, tools=tools)).output_text == "It is warm."
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.responses.create(**asked, tools=[{"type": "web_search"}])
        assert refused.value.param == "tools[0].type"


async def test_openais_client_reads_thoughts(tools_client, generator):
    generator.answer = THOUGHT
    transport = tools_client(reasoning_parser="qwen3")
    async with openai.AsyncOpenAI(base_url="http://x/v1", api_key="k", max_retries=0, http_client=transport) as ai:
        async with ai.responses.stream(model="m", input="hi", tools=FUNCTIONS) as stream:
            deltas = [e.delta async for e in stream if e.type == "response.reasoning_text.delta"]
            final = await stream.get_final_response()
        assert "".join(deltas) == final.output[0].content[0].text == "Hm, well."
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert final.output_text == "Let me see."
        again = [HI[0], *final.output]
        again.append({"type": "function_call_output", "call_id": final.output[2].call_id, "output": "warm"})
        assert (await ai.responses.create(model="m", input=again, tools=FUNCTIONS)).status == "completed"
