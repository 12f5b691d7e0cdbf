"""What /v1/responses and /v1/messages refuse of functions, thoughts and formats, and that they name the place."""

from __future__ import annotations

import pytest

from router.protocol.responses import ResponsesBody
from router.protocol.validation import validate
from workers.api.errors import InvalidRequest

from .test_calls_elsewhere import CALLED, FUNCTIONS, TOOLS, USED, ask
from .test_other_apis import HI, MESSAGES, RESPONSES

DEEP = '{"a":' * 70 + "1" + "}" * 70
HALF = '{"a": "\\ud800"}'
BROKEN = {"properties": {"function": {"not": {}}}}
CHAT_TOOL = {"type": "function", "function": {"name": "f"}}
SEARCH = {"type": "web_search", "search_context_size": "low"}
FORMAT = {"type": "json_schema", "name": "n", "schema": {"properties": {"json_schema": {"not": {}}}}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [SEARCH]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        ({"tools": [CHAT_TOOL]}, "tools[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [FUNCTIONS[1], FUNCTIONS[1]]}, "tools[1].name"),
        ({"tools": [{**FUNCTIONS[1], "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": 3}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "no"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.mode"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{**FUNCTIONS[1], "parameters": BROKEN}], "tool_choice": "required"},
         "tools[0].parameters.properties.function"),
        ({"tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "name": "n"}}}, "text.format.name"),
        ({"text": {"format": FORMAT}}, "text.format.schema.properties.json_schema"),
        ({"input": [CALLED | {"arguments": "["}]}, "input[0].arguments"),
        ({"input": [CALLED | {"arguments": "[" * 60000}]}, "input[0].arguments"),
        ({"input": [CALLED | {"arguments": DEEP}]}, "input[0].arguments"),
        ({"input": [CALLED | {"arguments": HALF}]}, "input[0].arguments"),
        ({"input": [CALLED | {"call_id": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
         "input[0].output[0].type"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input[0].summary"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": ["x"]}, "input[0]"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ],
    ids=range(31),
)  # fmt: skip
async def test_responses_name_the_place(tools_client, change, param):
    answer = await ask(tools_client(), RESPONSES, **change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def turn(*blocks, role="user"):
    return {"messages": [{"role": role, "content": list(blocks)}, *HI]}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].name"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "no"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "name": "time"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [{"name": "f", "input_schema": BROKEN}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema.properties.function"),
        ({"output_config": {"format": {"type": "json_schema", "schema": BROKEN}}},
         "output_config.format.schema.properties.function"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        (turn(USED), "messages[0].content[0].type"),
        (turn({"type": "tool_result", "tool_use_id": "c"}, role="assistant"), "messages[0].content[0].type"),
        (turn({"type": "redacted_thinking", "data": "x"}, role="assistant"), "redacted_thinking"),
        (turn({"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}),
         "messages[0].content[0].content[0].type"),
        (turn({**USED, "input": "x"}, role="assistant"), "messages[0].content[0].input"),
        (turn({"text": "x"}), "messages[0].content[0].type"),
        (turn(), "messages[0].content"),
        (turn("x"), "messages[0].content[0]"),
        ({"messages": [*HI, {"role": "assistant", "content": [USED]}]}, "messages[1].content[0].type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ],
    ids=range(27),
)  # fmt: skip
async def test_messages_name_the_place(tools_client, change, place):
    answer = await ask(tools_client(), MESSAGES, **change)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert place in answer.json()["error"]["message"]


def test_a_body_is_checked_by_itself():
    with pytest.raises(InvalidRequest) as refused:
        validate(ResponsesBody, {"model": "m", "input": "x", "tool_choice": "required"})
    assert refused.value.param == "tool_choice"
