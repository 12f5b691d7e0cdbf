"""The openai package, unmodified, against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import socket

import openai
import pytest
import uvicorn

from workers.api.errors import Overloaded, ReplicaLost

from .fakes import ANSWER

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def url(app):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await task
    listener.close()


@pytest.fixture
async def ai(url):
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as c:
        yield c


async def test_models(ai):
    assert [m.id async for m in ai.models.list()] == ["m", "org/base"]
    assert (await ai.models.retrieve("org/base")).id == "org/base"
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve("nope")


async def test_chat(ai, generator):
    answer = await ai.chat.completions.create(model="m", messages=HI, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    again = [*HI, answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert (await ai.chat.completions.create(model="m", messages=again)).choices[0].message.content == ANSWER


async def test_chat_stream(ai):
    stream = await ai.chat.completions.create(
        model="m", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", ""], {}, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [ANSWER, ANSWER]
    assert reasons == {0: "stop", 1: "stop"}
    assert usage.completion_tokens > 20


async def test_completions(ai):
    whole = await ai.completions.create(model="m", prompt="x", max_tokens=100, echo=True)
    assert whole.choices[0].text == "x" + ANSWER
    stream = await ai.completions.create(model="m", prompt=["x", "y"], max_tokens=100, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [ANSWER, ANSWER]


async def test_errors_have_their_classes(ai, generator):
    with pytest.raises(openai.BadRequestError) as e:
        await ai.chat.completions.create(model="m", messages=HI, temperature=3)
    assert (e.value.param, e.value.code) == ("temperature", "decimal_above_max_value")
    generator.refusal = Overloaded("full")
    with pytest.raises(openai.RateLimitError) as refused:
        await ai.chat.completions.create(model="m", messages=HI, stream=True)
    assert refused.value.response.headers["retry-after"] == "1"


async def test_a_failed_stream_raises(ai, generator):
    generator.failure = ReplicaLost("the replica died")
    stream = await ai.chat.completions.create(model="m", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="the replica died"):
        async for _ in stream:
            pass


async def test_leaving_mid_stream(ai, generator):
    generator.endless, generator.pause = True, 0.002
    stream = await ai.chat.completions.create(model="m", messages=HI, stream=True, max_tokens=200)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    while generator.running:  # noqa: ASYNC110 - endless when the front does not close it
        await asyncio.sleep(0.005)
    assert generator.closed == 1
    assert generator.steps < 150
