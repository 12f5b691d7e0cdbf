"""The anthropic package for Python, which speaks /v1/messages."""

import anthropic
from said import MESSAGES, MODEL, URL, tried

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
for change, kind in (
    ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError),
    ({"model": "nope"}, anthropic.NotFoundError),
):
    try:
        client.messages.create(**{**asked, **change})
        raise AssertionError(f"{change} was taken")
    except kind as e:
        assert e.body["type"] == "error"
tried("anthropic-python", "anthropic", "messages, streamed and not", "stop sequences", "count_tokens", "errors")
