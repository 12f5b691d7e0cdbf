"""The anthropic package for Python, which speaks /v1/messages."""

import json

import anthropic
from said import MESSAGES, MODEL, SUM, URL, tried

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
asked = {"model": MODEL, "max_tokens": 64, "messages": MESSAGES, "extra_body": {"temperature": 0}}
whole = client.messages.create(**asked)
(block,) = whole.content
assert "7" in block.text
assert whole.stop_reason == "end_turn"
assert whole.usage.output_tokens > 1

with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream) == block.text
    final = stream.get_final_message()
assert final.usage.output_tokens == whole.usage.output_tokens
kinds = [e.type for e in client.messages.create(**asked, stream=True)]
assert (kinds[0], kinds[1], kinds[-1]) == ("message_start", "content_block_start", "message_stop")

assert client.messages.create(**{**asked, "max_tokens": 2}).stop_reason == "max_tokens"
stopped = client.messages.create(**asked, stop_sequences=["7"])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "7")
assert client.messages.count_tokens(model=MODEL, messages=MESSAGES, system="Be short.").input_tokens > 5

tools = [{"name": "add", "description": "Adds.", "input_schema": SUM}]
choice = {"type": "any", "disable_parallel_tool_use": True}
called = client.messages.create(**asked, tools=tools, tool_choice=choice)
(use,) = called.content
assert (called.stop_reason, use.type, use.name, set(use.input)) == ("tool_use", "tool_use", "add", {"sum", "sure"})
with client.messages.stream(**asked, tools=tools, tool_choice={"type": "tool", "name": "add"}) as stream:
    kinds = [e.type for e in stream]
    (streamed,) = stream.get_final_message().content
assert "input_json" in kinds
assert set(streamed.input) == {"sum", "sure"}
result = {"type": "tool_result", "tool_use_id": use.id, "content": "7"}  # the demo model's template takes none
said = [*MESSAGES, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
assert client.messages.count_tokens(model=MODEL, messages=[*said[:2], *MESSAGES], tools=tools).input_tokens > 5
fixed = client.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": SUM}})
assert set(json.loads(fixed.content[0].text)) == {"sum", "sure"}
assert client.messages.create(**asked, thinking={"type": "disabled"}).content[0].text == block.text
for change, kind in (
    ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1100}, anthropic.BadRequestError),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
    ({"messages": said, "tools": tools}, anthropic.BadRequestError),
    ({"model": "nope"}, anthropic.NotFoundError),
):
    try:
        client.messages.create(**{**asked, **change})
        raise AssertionError(f"{change} was taken")
    except kind as e:
        assert e.body["type"] == "error"
tried(
    "anthropic-python",
    "anthropic",
    "messages, streamed and not",
    "stop sequences",
    "count_tokens",
    "tools",
    "output_config",
    "errors",
)
