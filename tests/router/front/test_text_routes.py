"""/generate, /tokenize, /detokenize, /v1/encode and /version: what they answer, and what they refuse."""

from __future__ import annotations

import json

import pytest

from .fakes import ANSWER, SPECIALS

HI = [{"role": "user", "content": "hi"}]
ROUTES = ("/generate", "/tokenize", "/detokenize", "/v1/encode")


async def post(client, path, **body):
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_generate_from_text_and_ids(client, generator, tokenizer):
    whole = await post(client, "/generate", model="m", prompt="hello", return_logprob=True)
    assert whole["text"] == ANSWER
    assert tokenizer.decode(whole["output_ids"]) == ANSWER
    assert whole["meta_info"]["finish_reason"] == {"type": "stop"}
    assert [t for _, t in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]
    assert whole["meta_info"]["completion_tokens"] == len(whole["output_ids"]) + 1  # the one that ended it
    ids = tokenizer.encode("hello")
    again = await post(client, "/generate", model="m", input_ids=ids, max_tokens=3)
    assert again["output_ids"] == whole["output_ids"][:3]
    assert again["meta_info"]["finish_reason"] == {"type": "length"}
    assert "output_token_logprobs" not in again["meta_info"]
    assert [r.prompt_ids for r in generator.requests] == [tuple(ids)] * 2
    assert [r.route for r in generator.requests] == ["/generate"] * 2
    assert [r.samplings[0].max_tokens for r in generator.requests] == [128, 3]


async def test_a_generate_stream_says_the_same_in_pieces(client):
    whole = await post(client, "/generate", model="m", prompt="x", return_logprob=True)
    answer = await client.post("/generate", json={"model": "m", "prompt": "x", "return_logprob": True, "stream": True})
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    seen = [json.loads(e.removeprefix("data: ")) for e in events]
    assert "".join(s["text"] for s in seen) == ANSWER
    assert [i for s in seen for i in s["output_ids"]] == whole["output_ids"]
    assert seen[-1]["meta_info"]["finish_reason"] == {"type": "stop"}
    assert seen[-1]["meta_info"]["completion_tokens"] == whole["meta_info"]["completion_tokens"]
    assert [s["meta_info"]["finish_reason"] for s in seen[:-1]] == [None] * (len(seen) - 1)


async def test_tokens_there_and_back(client, tokenizer):
    text = f"hello {SPECIALS[1]} wörld"
    seen = await post(client, "/tokenize", model="m", prompt=text, return_token_strs=True)
    assert seen["tokens"] == tokenizer.encode(text)
    assert (seen["count"], seen["max_model_len"]) == (len(seen["tokens"]), 256)
    assert len(seen["token_strs"]) == seen["count"]
    assert await post(client, "/detokenize", model="m", tokens=seen["tokens"]) == {"prompt": text}
    assert (await post(client, "/tokenize", model="m", prompt="x"))["token_strs"] is None


async def test_a_chat_is_tokenized_as_it_is_answered(client, generator):
    more = [*HI, {"role": "assistant", "content": "It"}]
    for asked in (
        {"messages": HI},
        {"messages": HI, "add_generation_prompt": False},
        {"messages": more, "continue_final_message": True},
        {"messages": [{"role": "user", "content": SPECIALS[1]}]},
    ):
        seen = await post(client, "/tokenize", model="m", **asked)
        await post(client, "/v1/chat/completions", model="m", max_tokens=1, **asked)
        assert tuple(seen["tokens"]) == generator.requests[-1].prompt_ids


async def test_encode_as_lmdeploy_documents_it(client, tokenizer):
    one, two = tokenizer.encode("hello"), tokenizer.encode("the end")
    assert await post(client, "/v1/encode", model="m", input="hello") == {"input_ids": one, "length": len(one)}
    both = await post(client, "/v1/encode", model="m", input=["hello", "the end"])
    assert both == {"input_ids": [one, two], "length": [len(one), len(two)]}
    chat = await post(client, "/v1/encode", model="m", input="hi", do_preprocess=True)
    assert chat["input_ids"] == (await post(client, "/tokenize", model="m", messages=HI))["tokens"]
    assert await post(client, "/v1/encode", model="m", input=[]) == {"input_ids": [], "length": []}


async def test_version(client):
    assert (await client.get("/version")).json() == {"version": "0"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/generate", {}, 400, "prompt"),
        ("/generate", {"prompt": "x", "input_ids": [5]}, 400, "prompt"),
        ("/generate", {"input_ids": []}, 400, "prompt"),
        ("/generate", {"input_ids": [-1]}, 400, "input_ids[0]"),
        ("/generate", {"input_ids": [10**6]}, 400, "input_ids"),
        ("/generate", {"prompt": ["x"]}, 400, "prompt"),
        ("/generate", {"prompt": ""}, 400, "prompt"),
        ("/generate", {"prompt": "x", "image_data": ["a"]}, 400, "image_data"),
        ("/generate", {"prompt": "x", "session_id": "a"}, 400, "session_id"),
        ("/generate", {"prompt": "x", "min_tokens": 129}, 400, "min_tokens"),
        ("/generate", {"prompt": "x" * 3000}, 400, "prompt"),
        ("/generate", {"prompt": "x", "foo": 1}, 400, "foo"),
        ("/generate", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/generate", {"prompt": "x", "model": None}, 400, "model"),  # there are two
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x y" * 9000}, 400, "prompt"),
        ("/tokenize", {"messages": HI, "model": "org/base"}, 404, "model"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
        ("/v1/encode", {}, 400, "input"),
        ("/v1/encode", {"input": [1]}, 400, "input[0]"),
        ("/v1/encode", {"input": ["x"] * 1025}, 400, "input"),
        ("/v1/encode", {"input": "x", "do_preprocess": "yes"}, 400, "do_preprocess"),
    ],
    ids=lambda v: None if isinstance(v, int) else str(v)[:40],
)
async def test_what_is_refused(client, path, body, status, param):
    answer = await client.post(path, json={"model": "m", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert (await client.post(path, json=[1])).status_code == 400
    assert (await client.get(path)).status_code == 405


async def test_bodies_that_are_no_json(client):
    for path in ROUTES:
        answer = await client.post(path, content=b"{", headers={"content-type": "application/json"})
        assert answer.status_code == 400
        answer = await client.post(path, content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 415
