"""Answers without HTTP are HTTP's answers; errors survive pickling."""

from __future__ import annotations

import asyncio
import json
import pickle

import httpx
import pytest

from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.perplexity import get_ppl
from router.protocol.errors import HttpRefusal, answer_for
from router.service import Service
from workers.api.errors import (
    ContextLengthExceeded,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    NoReplica,
    NotAuthorized,
    Overloaded,
    ReplicaLost,
)

from .conftest import base_of
from .test_bad_inputs import CHAT, COMPLETION

BODIES = [
    (CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}], "request_id": "r"}),
    (
        CHAT,
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "request_id": "r", "n": 3, "logprobs": True},
    ),
    (COMPLETION, {"model": "m", "prompt": ["a", "b"], "n": 2, "stop": "wörld", "max_tokens": 60, "request_id": "r"}),
    (COMPLETION, {"model": "m", "prompt": "a", "echo": True, "request_id": "r"}),
    (COMPLETION, {"model": "m", "prompt": "a", "nope": 1}),
    (COMPLETION, {"model": "nope", "prompt": "a"}),
    (COMPLETION, {"model": "m", "prompt": "a", "max_tokens": 10**6}),
    (CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 129}),
]


@pytest.fixture
def service(tokenizer, generator):
    models = [ServedModel("m", tokenizer, 256), ServedModel("org/base", base_of(tokenizer), 256)]
    service = Service(models, generator, draw_seed=lambda: 7, now=lambda: 1_700_000_000.0)
    yield service
    service.close()


@pytest.mark.parametrize(("route", "body"), BODIES)
async def test_a_reply_is_what_http_answers(client: httpx.AsyncClient, service: Service, route, body) -> None:
    http = await client.post(route, json=body)
    reply = await service.reply(route, json.dumps(body).encode(), Identity())
    assert (reply.status, reply.body) == (http.status_code, http.content)


async def test_the_loss_of_prompts(service: Service) -> None:
    for prompts, want in (("hello there", 0.5), ([40, 41, 42], 0.5), (["hello there", "the end"], [0.5, 0.5])):
        assert await get_ppl(service, Identity(), prompts, "m") == want
    with pytest.raises(InvalidRequest, match="nothing to predict"):
        await get_ppl(service, Identity(), [[40, 41], [40]], "m")
    with pytest.raises(ContextLengthExceeded):
        await get_ppl(service, Identity(), [40] * 256, "m")


@pytest.mark.parametrize(
    "refusal", [Overloaded("full", retry_after=2.5), RuntimeError("secret"), EngineFault("rank 0")]
)
async def test_a_reply_never_raises(service: Service, generator, refusal) -> None:
    generator.refusal = refusal
    reply = await service.reply(COMPLETION, b'{"model":"m","prompt":"a"}', Identity())
    wanted = answer_for(refusal)
    assert (reply.status, reply.body, reply.headers) == (wanted.status, wanted.body, wanted.headers)
    assert b"secret" not in reply.body


async def test_streams_and_unknown_routes_are_refused(service: Service, generator) -> None:
    with pytest.raises(InvalidRequest, match="stream"):
        await service.answer(COMPLETION, b'{"model":"m","prompt":"a","stream":true}', Identity())
    with pytest.raises(HttpRefusal, match=r"POST /v1/embeddings"):
        await service.answer("/v1/embeddings", b'{"model":"m","prompt":"a"}', Identity())
    assert generator.requests == []


async def test_token_ids_are_all_that_was_counted(service: Service, tokenizer, generator) -> None:
    generator.tokens_a_step = 3
    answer = await service.answer(COMPLETION, b'{"model":"m","prompt":"a","max_tokens":60,"n":2}', Identity())
    script = (*tokenizer.encode(generator.answer), tokenizer.eos_ids[0])
    assert answer.token_ids == (script, script)
    cut = await service.answer(COMPLETION, b'{"model":"m","prompt":"a","max_tokens":60,"stop":"The"}', Identity())
    assert answer.choices[0].text.startswith(cut.choices[0].text)
    assert cut.token_ids[0] == script[: cut.usage.completion_tokens]
    assert "The" in tokenizer.decode(cut.token_ids[0])


async def test_cancelling_closes_the_generator(service: Service, generator) -> None:
    generator.endless, generator.pause = True, 0.001
    task = asyncio.create_task(
        service.answer(COMPLETION, b'{"model":"m","prompt":["a","b"],"max_tokens":99}', Identity())
    )
    while generator.running < 2:  # noqa: ASYNC110 - the fake has no event
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (generator.running, generator.closed) == (0, 2)


@pytest.mark.parametrize(
    "error",
    [
        HttpRefusal(413, "too large", code="request_too_large", headers={"a": "b"}),
        ModelNotFound("nope"),
        ContextLengthExceeded("too long", param="prompt"),
        InvalidRequest("wrong", param="n", code="c"),
        NotAuthorized("who?"),
        NoReplica("none", retry_after=3.5),
        ReplicaLost("gone"),
    ],
)
def test_errors_come_back_from_a_pickle_as_they_were(error) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
    assert answer_for(back) == answer_for(error)


def test_two_models_of_one_name(tokenizer) -> None:
    model = ServedModel("m", tokenizer, 256)
    with pytest.raises(Exception, match="share a name"):
        Service([model, model], None, config=FrontConfig())
