"""Good requests: what comes back, streamed and not."""

from __future__ import annotations

import asyncio
import json

import pytest

from .fakes import ANSWER, encode_chat

CHAT = "/v1/chat/completions"
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def events_of(text):
    """The data of each event; asserts the framing."""
    assert text.endswith("\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] for line in lines]


def chunks_of(text):
    datas = events_of(text)
    assert datas[-1] == "[DONE]"
    return [json.loads(d) for d in datas[:-1]]


async def test_chat_whole(client, tokenizer, generator):
    generator.cached = 2
    r = await client.post(CHAT, json=HI)
    assert r.status_code == 200
    body = r.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    request = generator.requests[0]
    assert list(request.prompt_ids) == await asyncio.to_thread(encode_chat, tokenizer, HI["messages"])
    assert request.samplings[0].seed == 7
    assert request.samplings[0].max_tokens == 256 - len(request.prompt_ids)
    made = len(tokenizer.encode(ANSWER)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": made,
        "total_tokens": len(request.prompt_ids) + made,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert (generator.running, generator.closed) == (0, 1)


@pytest.mark.parametrize("seed", [None, 0, 1])
async def test_chat_stream(client, tokenizer, generator, seed):
    generator.seed = seed
    r = await client.post(CHAT, json=HI | {"stream": True, "stream_options": {"include_usage": True}})
    assert r.status_code == 200
    assert r.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(r.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(tokenizer.encode(ANSWER)) + 1
    assert all(c["usage"] is None for c in chunks)
    contents = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(contents) == ANSWER
    assert not any("\ufffd" in c for c in contents)
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_one_step_is_one_write(app, generator):
    """Three choices, one engine step: one body message with three events."""
    sent = []
    taken = asyncio.Event()

    async def all_taken():
        await taken.wait()
        taken.clear()

    generator.before_step = all_taken

    async def receive():
        if not sent:
            sent.append(None)
            body = json.dumps(HI | {"stream": True, "n": 3, "max_tokens": 2}).encode()
            return {"type": "http.request", "body": body}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            taken.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    await app(scope, receive, send)
    bodies = [m["body"].decode() for m in sent[1:] if m["type"] == "http.response.body"]
    # roles; first tokens; second tokens with the three reasons; [DONE]
    assert [b.count("data: ") for b in bodies] == [3, 3, 6, 1]


async def test_n_choices(client, generator, tokenizer):
    r = await client.post(CHAT, json=HI | {"n": 3, "seed": -1, "max_tokens": 5})
    body = r.json()
    expected = tokenizer.decode(tokenizer.encode(ANSWER)[:5])
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (i, expected, "length") for i in range(3)
    ]
    assert body["usage"]["completion_tokens"] == 15
    assert [(s.choice, s.seed) for s in generator.requests[0].samplings] == [(i, 2**64 - 1) for i in range(3)]


@pytest.mark.parametrize("size", [1, 3, 50])
async def test_stop_string_ends_early(client, generator, size):
    generator.tokens_a_step, generator.endless = size, True
    for stream in (False, True):
        r = await client.post(CHAT, json=HI | {"stop": ["The end", "zzz"], "stream": stream, "max_tokens": 200})
        if stream:
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(r.text))
            reason = chunks_of(r.text)[-1]["choices"][0]["finish_reason"]
        else:
            text, reason = r.json()["choices"][0]["message"]["content"], r.json()["choices"][0]["finish_reason"]
        assert (text, reason) == (ANSWER.split("The end")[0], "stop")
    assert (generator.running, generator.closed) == (0, 2)


async def test_completions_prompts_and_echo(client, tokenizer, generator):
    r = await client.post(
        "/v1/completions", json={"model": "m", "prompt": ["hello", "the end"], "n": 2, "max_tokens": 4, "echo": True}
    )
    body = r.json()
    assert r.status_code == 200
    text = tokenizer.decode(tokenizer.encode(ANSWER)[:4])
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "hello" + text),
        (1, "hello" + text),
        (2, "the end" + text),
        (3, "the end" + text),
    ]
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode("hello")) + len(tokenizer.encode("the end"))
    assert body["usage"]["completion_tokens"] == 16
    assert [r.prompt_ids for r in generator.requests] == [
        tuple(tokenizer.encode("hello")),
        tuple(tokenizer.encode("the end")),
    ]


async def test_log_probabilities_of_prompts(client, tokenizer, generator):
    body = {"model": "m", "prompt": ["hello wörld", "the end"], "n": 2, "max_tokens": 2, "prompt_logprobs": 1}
    r = await client.post("/v1/completions", json=body)
    choices = r.json()["choices"]
    for i, text in enumerate(("hello wörld", "the end")):
        ids = tokenizer.encode(text)
        first, *rest = choices[2 * i]["prompt_logprobs"]
        assert first is None
        # The fake finds the token itself the likeliest, each time.
        assert rest == [
            {str(t): {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_bytes(t).decode("utf-8", "replace")}}
            for t in ids[1:]
        ]
        assert choices[2 * i + 1]["prompt_logprobs"] == choices[2 * i]["prompt_logprobs"]
        assert choices[2 * i]["logprobs"] is None
    assert [s.prompt_logprobs for s in generator.requests[0].samplings] == [1, None]


async def test_an_echo_has_log_probabilities_of_the_prompt_before_those_of_the_answer(client, tokenizer, generator):
    body = {"model": "m", "prompt": "hello wörld", "max_tokens": 2, "echo": True, "logprobs": 2}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    shown, ids = choice["logprobs"], [*tokenizer.encode("hello wörld"), *tokenizer.encode(ANSWER)[:2]]
    assert shown["tokens"] == [tokenizer.token_bytes(t).decode("utf-8", "replace") for t in ids]
    assert shown["token_logprobs"] == [None, *[-0.5] * (len(ids) - 1)]
    assert shown["top_logprobs"][0] is None
    assert all(len(top) <= 2 for top in shown["top_logprobs"][1:])
    assert "prompt_logprobs" not in choice
    # Where a token's text begins: whole characters before it.
    pieces = [tokenizer.token_bytes(t) for t in ids]
    begins = [len(b"".join(pieces[:i]).decode("utf-8", "ignore")) for i in range(len(ids))]
    assert shown["text_offset"] == begins
    assert choice["text"][shown["text_offset"][-1] :].startswith(shown["tokens"][-1])


async def test_completions_of_ids_stream(client, generator):
    r = await client.post(
        "/v1/completions", json={"model": "m", "prompt": [[40, 41], [42]], "max_tokens": 100, "stream": True}
    )
    texts = ["", ""]
    for c in chunks_of(r.text):
        texts[c["choices"][0]["index"]] += c["choices"][0]["text"]
    assert texts == [ANSWER, ANSWER]
    assert [g.prompt_ids for g in generator.requests] == [(40, 41), (42,)]


async def test_completion_default_is_16_tokens(client, generator):
    r = await client.post("/v1/completions", json={"model": "org/base", "prompt": "hello"})
    assert r.json()["usage"]["completion_tokens"] == 16
    assert generator.requests[0].model == "org/base"


async def test_sampling_reaches_the_engine(client, generator, tokenizer):
    wanted = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100},
        "allowed_token_ids": [5, 6, 5],
        "seed": 12,
        "stop_token_ids": [9],
        "min_tokens": 2,
        "max_tokens": 7,
        "logprobs": True,
        "top_logprobs": 3,
    }
    r = await client.post(CHAT, json=HI | wanted)
    assert r.status_code == 200, r.text
    s = generator.requests[0].samplings[0]
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.0, 0.5, 3, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (s.logit_bias, s.allowed_ids, s.seed) == (((5, -100.0),), (5, 6), 12)
    assert (s.stop_ids, s.min_tokens, s.max_tokens, s.logprobs) == ((*tokenizer.eos_ids, 9), 2, 7, 3)
    await client.post(CHAT, json=HI | {"ignore_eos": True, "max_completion_tokens": 3, "cache_salt": "s"})
    s = generator.requests[1].samplings[0]
    assert (s.stop_ids, s.max_tokens) == ((), 3)
    assert generator.requests[0].salt == b""
    assert generator.requests[1].salt != b""


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client, tokenizer, stream):
    r = await client.post(CHAT, json=HI | {"logprobs": True, "top_logprobs": 2, "stream": stream, "stop": "The"})
    if stream:
        parts = [c["choices"][0]["logprobs"] for c in chunks_of(r.text)]
        content = [t for p in parts if p for t in p["content"]]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(r.text))
    else:
        content = r.json()["choices"][0]["logprobs"]["content"]
        text = r.json()["choices"][0]["message"]["content"]
    assert text == ANSWER.split("The")[0]
    assert b"".join(bytes(t["bytes"]) for t in content).decode() == text
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] == -0.5 for t in content)


async def test_completion_logprobs(client, tokenizer):
    r = await client.post("/v1/completions", json={"model": "m", "prompt": "x", "logprobs": 1, "max_tokens": 6})
    choice = r.json()["choices"][0]
    shown = choice["logprobs"]
    assert len(shown["tokens"]) == 6
    assert "".join(shown["tokens"]) == choice["text"]
    assert shown["text_offset"] == [sum(map(len, shown["tokens"][:i])) for i in range(6)]
    assert set(map(len, shown["top_logprobs"])) == {1}


async def test_models_health_and_docs(client, status):
    assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["m", "org/base"]
    assert (await client.get("/v1/models/org/base")).json()["max_model_len"] == 256
    assert (await client.get("/v1/models/nope")).json()["error"]["code"] == "model_not_found"
    for path, field in (("", "is_healthy"), ("/live", "is_live"), ("/ready", "is_ready")):
        assert (await client.get("/health" + path)).status_code == 200
        setattr(status, field, False)
        assert (await client.get("/health" + path)).status_code == 503
    assert (await client.get("/docs")).status_code == 200
    spec = (await client.get("/openapi.json")).json()
    schema = spec["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["model", "messages"]
    assert "$ref" not in json.dumps(schema)


async def test_request_id(client):
    assert (await client.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 129, ""):
        named = (await client.get("/nope", headers={"x-request-id": bad})).headers["x-request-id"]
        assert named.startswith("req-")
    r = await client.post(CHAT, json=HI | {"request_id": "mine"})
    assert r.json()["id"] == "chatcmpl-mine"
