"""Sessions of /v1/chat/interactive over HTTP: a round is the chat with all that was said before.

Mutants seen to fail: a history without the answer; one session for all owners; a stopped round's text lost; a broken
round that runs for ever; `forget` that keeps; an idempotency key that a refused round holds on to.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.remote_histories import LocalLine, RemoteHistories
from router.service import Service
from workers.api.errors import Overloaded

from .fakes import ANSWER, FakeStatus
from .test_bad_inputs import CHAT, INTERACTIVE
from .test_idempotency import LocalAnswers

SESSION = {"session_id": 3, "interactive_mode": True}


class Owners:
    """The owner is what the Authorization header says."""

    def resolve(self, headers, client):
        return Identity(headers.get("authorization", "default"))


class Front:
    """A front, and the table of its sessions."""

    def __init__(self, tokenizer, generator, **config):
        self.line, self.generator = LocalLine(), generator
        config = FrontConfig(**config)
        self.app = create_app(
            config,
            [ServedModel("m", tokenizer, 1024)],
            generator,
            FakeStatus(),
            identity=Owners(),
            answers=LocalAnswers(),
            histories=RemoteHistories(self.line, ttl=config.session_ttl, max_sessions=config.max_sessions),
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://front", timeout=30)

    async def ask(self, prompt, headers=None, **more):
        return await self.http.post(INTERACTIVE, json={"prompt": prompt, **SESSION, **more}, headers=headers)

    async def say(self, prompt, headers=None, **more):
        r = await self.ask(prompt, headers, **more)
        assert r.status_code == 200, r.text
        return r.json()

    def prompts(self):
        return [r.prompt_ids for r in self.generator.requests]

    async def begun(self):
        while not self.generator.steps:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.fixture
async def front(tokenizer, generator):
    made = Front(tokenizer, generator)
    async with made.http:
        yield made
    assert (made.line.histories.running, generator.running) == (0, 0)


async def whole(front, *said):
    """The prompt of /v1/chat/completions with all of this said in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    r = await front.http.post(CHAT, json={"model": "m", "messages": messages, "max_tokens": 1})
    assert r.status_code == 200, r.text
    return front.prompts()[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_round_is_the_chat_with_all_that_was_said(front, stream):
    said, history = [], 0
    for text in ("hi", "who made you?", "  and why <|im_end|>  "):
        said.append(text)
        r = await front.ask(text, stream=stream, request_output_len=200)
        answer = json.loads(r.content.splitlines()[-1])
        prompt = front.prompts()[-1]
        assert prompt == await whole(front, *said)
        assert answer["history_tokens"] == history
        assert answer["history_tokens"] + answer["input_tokens"] == len(prompt)
        history = len(prompt) + answer["tokens"]  # the end of the answer too: the template goes on from there
        said.append(ANSWER)
    assert len(front.line.histories) == 1


async def test_an_answer_that_was_cut_is_history_as_it_was_shown(front):
    first = await front.say("hi", request_output_len=3)
    cut = await front.say("go on", stop="wör")
    assert (first["finish_reason"], cut["text"]) == ("length", "Hello, ")
    third = await front.say("and now?")
    assert front.prompts()[-1] == await whole(front, "hi", first["text"], "go on", cut["text"], "and now?")
    assert 0 < third["history_tokens"] < len(front.prompts()[1]) + cut["tokens"]  # what the stop string cut off is gone


async def test_sessions_are_their_owners(front):
    await front.say("hi")
    for headers, number, kept in (({"authorization": "anna"}, 3, False), ({}, 4, False), ({}, 3, True)):
        answer = await front.say("and?", headers, session_id=number)
        assert (answer["history_tokens"] > 0) is kept
    assert (await front.say("hi", session_id=-1))["history_tokens"] == 0
    assert (await front.say("hi", session_id=-1))["history_tokens"] == 0
    assert len(front.line.histories) == 3


async def test_without_interactive_mode_a_session_starts_anew(front):
    await front.say("hi")
    assert (await front.say("alone", interactive_mode=False))["history_tokens"] == 0
    assert front.prompts()[-1] == await whole(front, "alone")
    assert (await front.say("hi again"))["history_tokens"] == 0
    assert front.prompts()[-1] == await whole(front, "hi again")


async def test_one_round_at_a_time(front):
    front.generator.pause = 0.001
    first = asyncio.create_task(front.ask("hi"))
    await front.begun()
    for more in ({}, {"interactive_mode": False}, {"stream": True}):
        r = await front.ask("too soon", **more)
        assert (r.status_code, r.json()["error"]["code"]) == (409, "session_in_use")
        assert "session 3" in r.json()["error"]["message"]
    assert (await first).status_code == 200
    assert (await front.say("now"))["history_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_round_keeps_what_it_has(front, stream):
    front.generator.endless, front.generator.pause = True, 0.001
    running = asyncio.create_task(front.ask("hi", stream=stream))
    while front.generator.steps < 5:  # noqa: ASYNC110
        await asyncio.sleep(0)
    done = await front.ask("", cancel=True)
    assert (done.status_code, front.line.histories.running) == (200, 0)
    assert done.json() == {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": None}
    lines = [json.loads(line) for line in (await running).content.splitlines()]
    assert (lines[-1]["finish_reason"], front.generator.running) == ("abort", 0)
    text = "".join(line["text"] for line in lines)
    assert len(text) >= 4
    front.generator.endless, front.generator.pause = False, 0.0
    await front.say("again")
    assert front.prompts()[-1] == await whole(front, "hi", text, "again")


async def test_a_round_that_is_cancelled_before_it_began_has_not_been(front):
    lock, waiting = asyncio.Event(), asyncio.Event()

    async def hold():
        waiting.set()
        await lock.wait()

    front.generator.before_step = hold
    running = asyncio.create_task(front.ask("hi"))
    await waiting.wait()
    assert (await front.ask("", cancel=True)).status_code == 200
    answer = (await running).json()
    assert (answer["text"], answer["tokens"], answer["finish_reason"]) == ("", 0, "abort")
    assert (await front.ask("", cancel=True)).status_code == 200  # nothing runs: nothing to do
    assert len(front.line.histories) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_round_whose_client_leaves_has_not_been(front, stream):
    await front.say("hi")
    front.generator.endless, front.generator.pause, front.generator.steps = True, 0.001, 0
    gone, sent = asyncio.Event(), []

    async def receive():
        if not sent:
            sent.append(None)
            body = {"prompt": "bye", "stream": stream, **SESSION}
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": INTERACTIVE, "raw_path": INTERACTIVE.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("front", 80),
    }  # fmt: skip
    call = asyncio.create_task(front.app(scope, receive, send))
    await front.begun()
    gone.set()
    await asyncio.gather(call, return_exceptions=True)
    front.generator.endless, front.generator.pause = False, 0.0
    await front.say("again")
    assert front.prompts()[-1] == await whole(front, "hi", ANSWER, "again")


async def test_a_round_that_fails_has_not_been(front):
    await front.say("hi")
    front.generator.failure = RuntimeError("broken")
    assert (await front.ask("lost")).status_code == 500
    front.generator.failure, front.generator.refusal = None, Overloaded("full")
    assert (await front.ask("lost")).status_code == 429
    front.generator.refusal = None
    assert (await front.ask("x" * 4000)).json()["error"]["code"] == "context_length_exceeded"
    await front.say("again")
    assert front.prompts()[-1] == await whole(front, "hi", ANSWER, "again")


async def test_a_retry_with_its_idempotency_key_is_no_round(front):
    first = await front.ask("hi", {"idempotency-key": "k"})
    again = await front.ask("hi", {"idempotency-key": "k"})
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
    front.generator.pause = 0.001
    both = await asyncio.gather(*(front.ask("next", {"idempotency-key": "l"}) for _ in range(2)))
    assert {r.status_code for r in both} == {200}
    assert len(front.prompts()) == 2
    front.generator.pause = 0.0
    assert (await front.ask("x" * 4000, {"idempotency-key": "m"})).status_code == 400
    await front.say("last", {"idempotency-key": "m"})
    assert front.prompts()[-1] == await whole(front, "hi", ANSWER, "next", ANSWER, "last")


async def test_the_longest_idle_session_makes_room(tokenizer, generator):
    front = Front(tokenizer, generator, max_sessions=2)
    async with front.http:
        for number in (1, 2, 1, 3):
            await front.say("hi", session_id=number)
        found = [(await front.say("?", session_id=n))["history_tokens"] > 0 for n in (1, 3)]
        assert (found, len(front.line.histories)) == ([True, True], 2)
        generator.pause = 0.001
        running = [asyncio.create_task(front.ask("?", session_id=n)) for n in (1, 3)]
        while generator.running < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert (await front.ask("hi", session_id=4)).status_code == 429
        assert {r.status_code for r in await asyncio.gather(*running)} == {200}


async def test_a_session_expires(tokenizer, generator):
    front = Front(tokenizer, generator, session_ttl=1e-6)
    async with front.http:
        for _ in range(2):
            assert (await front.say("hi"))["history_tokens"] == 0


async def test_rounds_by_ray_handles_too(front, tokenizer, generator):
    """`Service.reply` is what the gateway calls."""

    service = Service(
        [ServedModel("m", tokenizer, 1024)], generator, histories=RemoteHistories(front.line, ttl=9, max_sessions=9)
    )
    await front.say("hi")
    body = json.dumps({"prompt": "and?", **SESSION}).encode()
    reply = await service.reply(INTERACTIVE, body, Identity("default"))
    assert json.loads(reply.body)["history_tokens"] > 0
    reply = await service.reply(INTERACTIVE, b'{"cancel": true, "session_id": 3}', Identity("default"))
    assert (reply.status, json.loads(reply.body)["tokens"]) == (200, 0)
    service.close()
