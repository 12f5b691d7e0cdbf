"""The main job over real Ray: HTTP in, tokens of the demo model out."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.ray

QUESTION = "What is 3 + 4?"


def test_a_chat_is_answered_and_ends_by_itself(cluster: Any) -> None:
    answer = cluster.chat(QUESTION)
    choice = answer["choices"][0]
    assert "7" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_openai_package_streams_what_it_gets_at_once(cluster: Any) -> None:
    client = openai.OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Count from 3 to 12."}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    stream = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, finish, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert finish == [whole.choices[0].finish_reason] == ["stop"]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert [m.id for m in client.models.list()] == ["demo", "second"]


def test_completions_route(cluster: Any) -> None:
    status, answer = cluster.post("/completions", {"model": "demo", "prompt": "3 + 4", "max_tokens": 5, "n": 2})
    assert status == 200
    assert sorted(c["index"] for c in answer["choices"]) == [0, 1]


def test_many_streams_at_once(cluster: Any) -> None:
    async def run() -> list[tuple[int, str]]:
        async with openai.AsyncOpenAI(base_url=cluster.base_url, api_key="none", max_retries=0) as client:

            async def one(i: int) -> tuple[int, str]:
                messages: Any = [{"role": "user", "content": f"What is {i} + 4?"}]
                stream = await client.chat.completions.create(
                    model="demo", messages=messages, temperature=0, stream=True
                )
                return i, "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            return await asyncio.gather(*(one(i) for i in range(32)))

    answers = asyncio.run(run())
    right = [i for i, text in answers if str(i + 4) in text]
    assert len(right) >= 28, answers


def test_a_wrong_request_is_told_why(cluster: Any) -> None:
    status, answer = cluster.post("/chat/completions", {"model": "demo", "messages": [], "tempreature": 1})
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    status, answer = cluster.post("/chat/completions", {"model": "nope", "messages": [{"role": "user", "content": ""}]})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_client_that_leaves_frees_its_blocks(cluster: Any) -> None:
    client = openai.OpenAI(base_url=cluster.base_url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Count from 1 to 20."}]
    with client.chat.completions.create(
        model="demo", messages=messages, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    # the fixture checks that nothing is left behind
