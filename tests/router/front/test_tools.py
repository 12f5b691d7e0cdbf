"""Tools and thoughts in chats: what the template sees, what clients get, streamed and not."""

from __future__ import annotations

import json

import pytest

from router.http.config import ServedModel
from workers.api.errors import ConfigError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
    "$defs": {"city": {"type": "string", "maxLength": 9}}, "additionalProperties": False}}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def ask(client, **body):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 99,
        "tools": [WEATHER, TIME],
        **body,
    }
    async with client:
        return await client.post("/v1/chat/completions", json=body)


def parts(answer):
    """A stream's deltas put together, as OpenAI's clients do it."""
    message, finish = {"content": "", "tool_calls": []}, None
    for line in answer.text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        delta, finish = choice["delta"], choice["finish_reason"] or finish
        message["content"] += delta.get("content") or ""
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append(call)
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message, finish


def read(answer, stream):
    """Its message and why it ended."""
    if stream:
        return parts(answer)
    choice = answer.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


async def test_an_automatic_call(tools_client, generator):
    generator.answer = "Let me see.\n" + CALL
    choice = (await ask(tools_client())).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert generator.requests[-1].grammar is None


async def test_a_streamed_call(tools_client, generator):
    generator.answer = CALL
    answer = await ask(tools_client(), stream=True)
    message, finish = parts(answer)
    assert (finish, message["content"]) == ("tool_calls", "")
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert answer.text.count('"arguments":"') > 4  # as they grow


async def test_every_event_of_a_parsed_stream_tells_the_usage(tools_client, generator):
    generator.answer = "<think>Hm.</think>See. " + CALL
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await ask(
        tools_client(reasoning_parser="qwen3"),
        stream=True,
        stream_options=options,
        max_completion_tokens=400,
        max_tokens=None,
    )
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert events[-1]["choices"] == []
    assert '"name":"weather"' in answer.text


async def test_pieces_that_come_in_one_step_each_tell_the_usage(tools_client, generator):
    generator.answer, generator.tokens_a_step = "<think>\nHm.\n</think>\n\n" + CALL, 400
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await ask(tools_client(reasoning_parser="qwen3"), stream=True, stream_options=options)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if "{" in line]
    assert len(events) > 4
    assert {event["usage"]["completion_tokens"] for event in events[1:]} == {events[-1]["usage"]["completion_tokens"]}


async def test_text_is_no_call(tools_client, generator):
    generator.answer = "It is warm."
    choice = (await ask(tools_client())).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "It is warm.")
    assert "tool_calls" not in choice["message"]
    generator.answer = CALL  # no tools are offered
    for body in ({"tool_choice": "none"}, {"tools": None}, {"tools": []}):
        choice = (await ask(tools_client(), **body)).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)


async def test_the_template_sees_tools_and_calls(tools_client, generator, tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "warm"},
    ]
    assert (await ask(tools_client(), messages=messages, tools=[TIME])).status_code == 200
    prompt = tokenizer.decode(generator.requests[-1].prompt_ids, skip_special_tokens=False)
    assert prompt == (
        '[{"type": "function", "function": {"name": "time"}}]<|im_start|>user|Hi<|im_end|><|im_start|>assistant|'
        '[weather:{"city": "Oslo"}]<|im_end|><|im_start|>tool|warm(call_1)<|im_end|>'
    )
    assert (await ask(tools_client(), tool_choice="none")).status_code == 200
    assert "weather" not in tokenizer.decode(generator.requests[-1].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_required_call_is_enforced_and_read(tools_client, generator, stream):
    generator.answer = '[{"name":"weather","parameters":{"city":"Rom"}},{"name":"time","parameters":{}}]'
    answer = await ask(tools_client(tool_parser=None), tool_choice="required", stream=stream)
    message, finish = (
        parts(answer) if stream else (answer.json()["choices"][0][k] for k in ("message", "finish_reason"))
    )
    names = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    assert (finish, names) == ("tool_calls", [("weather", '{"city":"Rom"}'), ("time", "{}")])
    schema = json.loads(generator.requests[-1].grammar.source)
    assert schema["$defs"]["tool0"]["properties"]["city"] == {"$ref": "#/$defs/tool0/$defs/city"}
    assert "maxItems" not in schema
    await ask(tools_client(), tool_choice="required", parallel_tool_calls=False)
    assert json.loads(generator.requests[-1].grammar.source)["maxItems"] == 1


async def test_a_named_call_is_enforced_and_read(tools_client, generator):
    generator.answer = '{"city":"Rom"}'
    named = {"type": "function", "function": {"name": "weather"}}
    choice = (await ask(tools_client(), tool_choice=named)).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Rom"}'}
    assert choice["message"]["content"] is None
    assert json.loads(generator.requests[-1].grammar.source)["required"] == ["city"]


TWICE = [TIME, TIME]
BROKEN = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]
TOOL_MESSAGE = {"role": "tool", "content": "x"}
CALLED, HALF, DEEP = (
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    for arguments in ("[", '{"a": "\\ud800"}', '{"a":' * 2000 + "1" + "}" * 2000)
)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TWICE}, "tools[1].function.name"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice.function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": BROKEN}, "tools[0].function.parameters.properties.a"),
        ({"messages": [TOOL_MESSAGE]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALLED]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [HALF]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [DEEP]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    ],
    ids=range(17),
)  # fmt: skip
async def test_refusals_name_their_place(tools_client, body, param):
    answer = await ask(tools_client(), **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_split_off(tools_client, generator, stream):
    generator.answer = "<think>\nHm.\n</think>\n\n" + CALL
    answer = await ask(tools_client(reasoning_parser="qwen3"), stream=stream)
    message, finish = (
        parts(answer) if stream else (answer.json()["choices"][0][k] for k in ("message", "finish_reason"))
    )
    assert (message["reasoning_content"], finish) == ("Hm.", "tool_calls")
    assert message["tool_calls"][0]["function"]["name"] == "weather"


async def test_a_grammar_begins_after_the_thoughts(tools_client, generator):
    body = {"response_format": {"type": "json_object"}, "tools": None}
    await ask(tools_client(reasoning_parser="qwen3"), **body)
    assert generator.requests[-1].grammar.begins_after == "</think>"
    closed = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\n\n</think>"}]
    generator.answer = '{"a":1}'
    choice = (
        await ask(tools_client(reasoning_parser="qwen3"), messages=closed, continue_final_message=True, **body)
    ).json()["choices"][0]
    assert generator.requests[-1].grammar.begins_after == ""
    assert choice["message"]["content"] == '{"a":1}'


async def test_efforts_reach_a_template_that_reads_them(tools_client, generator, tokenizer):
    template = "{{ reasoning_effort }}{% if thinking is defined %}{{ thinking }}{% endif %}"
    for body, shown in (
        ({"reasoning_effort": "low"}, "low"),
        ({"reasoning_effort": "none"}, "False"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "mine"}}, "mine"),
    ):
        assert (await ask(tools_client(template=template), **body)).status_code == 200
        assert tokenizer.decode(generator.requests[-1].prompt_ids) == shown
    assert (await ask(tools_client(), reasoning_effort="none")).status_code == 200
    refused = await ask(tools_client(), reasoning_effort="low")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")


def test_unknown_parsers_are_refused_at_the_start(tokenizer):
    for name in ("tool_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match="is not one of"):
            ServedModel("m", tokenizer, 256, **{name: "nobody"})
