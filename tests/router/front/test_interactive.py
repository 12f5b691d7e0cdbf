"""/v1/chat/interactive: LMDeploy's answer, whole and line by line, over the same pipeline as the other routes.

Mutants seen to fail: `tokens` of the prompt; the defaults of the plain routes; a stream with `[DONE]`; a model guessed.
"""

from __future__ import annotations

import json

import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import NoKeys
from workers.api.errors import EngineFault, Overloaded

from .fakes import ANSWER, FakeStatus
from .test_access import call
from .test_bad_inputs import CHAT, HI, INTERACTIVE

ASK = {"prompt": "hi", "request_output_len": 200}
FIELDS = ["text", "tokens", "input_tokens", "history_tokens", "finish_reason"]


@pytest.fixture
def app(tokenizer, generator):
    return create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, FakeStatus(), draw_seed=lambda: 7)


async def ask(app, **more):
    return await call(app, path=INTERACTIVE, body=json.dumps(ASK | more).encode(), client="127.0.0.1")


async def test_a_whole_answer(app, generator, tokenizer):
    answer = await ask(app)
    shown = json.loads(answer.body)
    assert list(shown) == FIELDS
    made, prompt = len(tokenizer.encode(ANSWER)) + 1, len(generator.requests[0].prompt_ids)
    assert list(shown.values()) == [ANSWER, made, prompt, 0, "stop"]
    cut = json.loads((await ask(app, request_output_len=3)).body)
    assert (cut["tokens"], cut["finish_reason"]) == (3, "length")
    assert json.loads((await ask(app, stop=["wör"])).body)["text"] == ANSWER.partition("wör")[0]


async def test_it_is_the_chat_with_documented_defaults(app, generator):
    await ask(app)
    await ask(app, prompt=[HI])
    chat = {"model": "m", "messages": [HI], "max_tokens": 200, "temperature": 0.8, "top_p": 0.8, "top_k": 40}
    await call(app, path=CHAT, body=json.dumps(chat).encode(), client="127.0.0.1")
    text, messages, plain = generator.requests
    assert text.prompt_ids == messages.prompt_ids == plain.prompt_ids
    assert text.samplings == messages.samplings == plain.samplings
    assert text.route == INTERACTIVE
    await ask(app, temperature=0, top_p=1, top_k=-1, repetition_penalty=1.5, ignore_eos=True, request_output_len=9)
    (own,) = generator.requests[-1].samplings
    assert (own.temperature, own.top_p, own.top_k, own.repetition_penalty, own.max_tokens) == (0.0, 1.0, 0, 1.5, 9)
    assert own.stop_ids == ()
    await ask(app, request_output_len=None)
    fits = generator.requests[-1]
    assert fits.samplings[0].max_tokens == 256 - len(fits.prompt_ids)


async def test_what_asks_for_nothing_is_taken(app):
    nothing = {"session_id": 7, "interactive_mode": False, "cancel": False, "image_url": None, "adapter_name": None}
    optional = ("model", "stream", "top_p", "top_k", "temperature", "repetition_penalty", "ignore_eos")
    answer = await ask(app, **nothing, **dict.fromkeys(optional), stop=None, skip_special_tokens=None, kwargs={})
    assert (answer.status, json.loads(answer.body)["text"]) == (200, ANSWER)


@pytest.mark.parametrize("size", [1, 3])
async def test_a_stream_is_lines_of_json(app, generator, size):
    generator.tokens_a_step = size
    whole = json.loads((await ask(app)).body)
    answer = await ask(app, stream=True)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in answer.body.split(b"\n")[:-1]]
    assert all(list(line) == FIELDS for line in lines)
    assert len(lines) > 3
    assert "".join(line["text"] for line in lines) == ANSWER
    counts = [line["tokens"] for line in lines]
    assert counts == sorted(counts)
    assert lines[-1] == whole | {"text": ""}
    assert {line["finish_reason"] for line in lines[:-1]} == {None}


async def test_a_stream_that_fails_ends_with_its_error(app, generator):
    generator.failure = EngineFault("rank 0 is gone")
    lines = (await ask(app, stream=True)).body.splitlines()
    assert json.loads(lines[-1])["error"]["type"] == "server_error"
    assert len(lines) > 1
    assert all(json.loads(line)["finish_reason"] is None for line in lines[:-1])
    generator.refusal = Overloaded("full")
    assert (await ask(app, stream=True)).status == 429
    assert generator.running == 0


async def test_the_only_model_that_one_may_use_needs_no_name(tokenizer, generator):
    models = [ServedModel("m", tokenizer, 256), ServedModel("other", tokenizer, 256)]
    app = create_app(FrontConfig(), models, generator, FakeStatus(), identity=NoKeys())
    answer = await ask(app)
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert (await ask(app, model="other")).status == 200
    assert generator.requests[-1].model == "other"
