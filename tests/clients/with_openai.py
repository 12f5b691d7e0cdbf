"""The openai package for Python."""

import asyncio
import json

import openai
import pydantic
from said import MESSAGES, MODEL, QUESTION, SUM, URL, tried


class Answer(pydantic.BaseModel):
    sum: int
    sure: bool


client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
assert MODEL in [m.id for m in client.models.list()]
whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2)
text = whole.choices[0].message.content
assert "7" in text
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2

options = {"include_usage": True, "continuous_usage_stats": True}
chunks = list(
    client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options=options)
)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert chunks[-1].usage == whole.usage
with client.chat.completions.stream(model=MODEL, messages=MESSAGES, temperature=0) as stream:
    assert stream.get_final_completion().choices[0].message.content == text

best = client.completions.create(model=MODEL, prompt="3 + 4 =", n=2, best_of=4, max_tokens=5, seed=1)
assert [c.index for c in best.choices] == [0, 1]
search = {"use_beam_search": True, "ignore_eos": True}
beams = client.completions.create(model=MODEL, prompt="3 + 4 =", n=3, max_tokens=8, logprobs=0, extra_body=search)
sums = [sum(c.logprobs.token_logprobs) for c in beams.choices]
assert len({c.text for c in beams.choices}) == 3
assert sums == sorted(sums, reverse=True)
echo = client.completions.create(model=MODEL, prompt="3 + 4", echo=True, logprobs=1, max_tokens=2, temperature=0)
assert echo.choices[0].logprobs.token_logprobs[0] is None
first = text.split()[0]
other = client.chat.completions.create(
    model=MODEL, messages=MESSAGES, temperature=0, extra_body={"bad_words": [first], "min_tokens": 1}
)
assert first not in other.choices[0].message.content.split()
try:
    client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    raise AssertionError("a temperature of 3 was taken")
except openai.BadRequestError as e:
    assert e.param == "temperature"


async def many() -> None:
    async with openai.AsyncOpenAI(base_url=URL + "/v1", api_key="none", max_retries=0) as several:
        asked = [several.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0) for _ in range(8)]
        assert {a.choices[0].message.content for a in await asyncio.gather(*asked)} == {text}


asyncio.run(many())
what = [
    "models",
    "chat, streams and their accumulator",
    "log-probabilities",
    "best_of, beam search, echo, bad_words",
    "errors",
]
if hasattr(client, "responses"):
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, store=False)
    assert answer.output_text == text
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, store=False) as events:
        kinds = [e.type for e in events]
        assert events.get_final_response().output_text == text
    assert kinds[0] == "response.created"
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Answer, store=False)
    assert isinstance(parsed.output_parsed, Answer)
    tools = [{"type": "function", "name": "add", "parameters": SUM, "strict": True}]
    asked = {"model": MODEL, "tools": tools, "tool_choice": "required", "temperature": 0, "store": False}
    (call,) = client.responses.create(**asked, input=QUESTION, parallel_tool_calls=False).output
    assert (call.type, call.name) == ("function_call", "add")
    assert set(json.loads(call.arguments)) == {"sum", "sure"}
    with client.responses.stream(**asked, input=QUESTION, parallel_tool_calls=False) as events:
        (streamed,) = events.get_final_response().output
    assert (streamed.arguments, streamed.parsed_arguments) == (call.arguments, json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    said = [*MESSAGES, call.model_dump(exclude_none=True), result]
    try:
        client.responses.create(**{**asked, "tool_choice": "auto"}, input=said)
        raise AssertionError("the demo model's template took a result")
    except openai.BadRequestError as e:
        assert e.param == "input"
    what.append("responses, streamed and not, with functions and a pydantic format")
tried("openai-python", "openai", *what, "8 at once")
