"""Parameters beyond the common ones: bad words, best_of, the prompt's log-probabilities, usage in every event, ..."""

from __future__ import annotations

import json

import httpx
import pytest
from tokenizers import AddedToken

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.protocol.sampling import RequestLimits
from router.text.tokenizer import Tokenizer
from workers.api.request import BeamParams, TokenLogprobs

from .fakes import ANSWER, SPECIALS, FakeGenerator, FakeStatus, encode_chat, make_backend
from .test_bad_inputs import CHAT, COMPLETION

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chunks_of(text):
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(e.removeprefix("data: ")) for e in events]


async def post(client, path, **body):
    answer = await client.post(path, json={"model": "m", **body})
    assert answer.status_code == 200, answer.text
    return chunks_of(answer.text) if body.get("stream") else answer.json()


async def test_bad_words_reach_the_engine_in_all_their_spellings(client, generator, tokenizer):
    await post(client, COMPLETION, prompt="x", bad_words=["hello", "the world", "hello"])
    (words,) = {s.bad_words for s in generator.requests[0].samplings}
    assert {tuple(tokenizer.encode(t)) for t in ("hello", "the world", " the world")} == set(words)
    assert tokenizer.encode(" hello")[1:] == tokenizer.encode("hello")  # a space of its own needs no spelling more
    assert max(map(len, words)) > 1
    await post(client, CHAT, **HI, bad_words=[SPECIALS[2]])
    (sampling,) = generator.requests[1].samplings
    assert (tokenizer.eos_ids[0],) in sampling.bad_words


class Graded(FakeGenerator):
    """Choice c of a prompt has tokens of log-probability `grades[c]`."""

    grades = (-0.5, -0.1, -0.9, -0.3)

    async def generate(self, request, sink):
        def graded(batch):
            for d in batch:
                scores = tuple(TokenLogprobs(i, self.grades[d.choice], 1) for i in d.delta.token_ids)
                object.__setattr__(d.delta, "logprobs", scores)
            return sink(batch)

        await super().generate(request, graded)


@pytest.fixture
def graded(app, tokenizer, status):
    generator = Graded(tokenizer)
    return generator, create_app(FrontConfig(), [ServedModel("m", tokenizer, 256)], generator, status)


async def test_best_of_shows_the_likeliest(graded):
    generator, app = graded
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        body = {"prompt": ["hello", "the end"], "best_of": 4, "n": 2, "max_tokens": 3, "echo": True}
        plain = await post(client, COMPLETION, **body)
        assert [c["index"] for c in plain["choices"]] == [0, 1, 2, 3]
        assert [c["logprobs"] for c in plain["choices"]] == [None] * 4
        assert [c["text"].startswith("hello") for c in plain["choices"]] == [True, True, False, False]
        assert plain["usage"]["completion_tokens"] == 2 * 4 * 3  # all that were made
        shown = await post(client, COMPLETION, **{**body, "echo": False}, logprobs=0)
        assert [set(c["logprobs"]["token_logprobs"]) for c in shown["choices"]] == [{-0.1}, {-0.3}] * 2
        assert [s.choice for s in generator.requests[0].samplings] == [0, 1, 2, 3]


async def test_of_best_of_the_first_are_shown_whatever_their_means(graded):
    generator, app = graded
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        body = {"prompt": ["hello", "the end"], "best_of": 4, "n": 2, "max_tokens": 3, "logprobs": 0}
        by_mean = await post(client, COMPLETION, **body)
        searched = await post(client, COMPLETION, **body, use_beam_search=True)
    assert generator.requests[-1].beams == BeamParams(4)
    first = [choice["logprobs"]["token_logprobs"][0] for choice in searched["choices"]]
    assert first != [choice["logprobs"]["token_logprobs"][0] for choice in by_mean["choices"]]
    assert searched["usage"]["completion_tokens"] == 2 * 4 * 3


async def test_a_chat_shows_its_prompts_log_probabilities(client, generator):
    whole = await post(client, CHAT, **HI, prompt_logprobs=1, max_tokens=3)
    first, *rest = whole["prompt_logprobs"]
    ids = generator.requests[0].prompt_ids
    assert first is None
    assert [set(map(int, one)) for one in rest] == [{i, *({i % 300})} for i in ids[1:]]
    assert all(
        one[str(i)]["logprob"] == -0.5 and one[str(i)]["rank"] == 1 for i, one in zip(ids[1:], rest, strict=True)
    )
    assert "prompt_logprobs" not in await post(client, CHAT, **HI, max_tokens=3)
    events = await post(client, CHAT, **HI, prompt_logprobs=1, max_tokens=3, stream=True)
    (shown,) = [c["choices"][0]["prompt_logprobs"] for c in events if "prompt_logprobs" in c["choices"][0]]
    assert shown == whole["prompt_logprobs"]


async def test_a_stream_echoes_with_log_probabilities(client):
    body = {"prompt": ["hello wörld", "the end"], "echo": True, "logprobs": 1, "prompt_logprobs": 0, "max_tokens": 5}
    whole = await post(client, COMPLETION, **body)
    events = await post(client, COMPLETION, **body, stream=True)
    for i, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in events if c["choices"][0]["index"] == i]
        assert "".join(p["text"] for p in parts) == choice["text"]
        assert parts[0]["prompt_logprobs"] == choice["prompt_logprobs"]
        for field, values in choice["logprobs"].items():
            assert [v for p in parts if p["logprobs"] for v in p["logprobs"][field]] == values
    one = await post(client, COMPLETION, prompt=[40], echo=True, logprobs=0, stream=True, max_tokens=1)
    assert one[0]["choices"][0]["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_usage_in_every_event(client, path):
    body = {**HI, "n": 2} if path == CHAT else {"model": "m", "prompt": "hi", "n": 2}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await post(
        client,
        path,
        **body,
        max_tokens=4,
        stream=True,
        stream_options=options,
        logprobs=1 if path == COMPLETION else None,
    )
    *counts, last = [e["usage"] for e in events]
    made = [c["completion_tokens"] for c in counts]
    assert made == sorted(made)
    assert (made[-1], last["completion_tokens"]) == (8, 8)
    assert {c["prompt_tokens"] for c in counts} == {last["prompt_tokens"]}
    alone = await post(client, path, **body, max_tokens=4, stream=True, stream_options={"continuous_usage_stats": True})
    assert alone[-1]["usage"] == last


def test_a_template_reads_its_variables_and_their_text_stays_text(tokenizer, model_folder, tmp_path):
    for name in ("tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    source = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}{{ note }}{{ bos_token }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    own = Tokenizer.from_folder(tmp_path, trust_template=True)
    bos = own.encode(SPECIALS[0])[-1]
    messages = [{"role": "user", "content": "hi"}]
    thinks = encode_chat(own, messages, variables={"enable_thinking": True, "bos_token": "no"})
    assert own.decode(thinks, skip_special_tokens=False) == "hi<think>" + SPECIALS[0]
    forged = encode_chat(own, messages, variables={"note": SPECIALS[0]})
    assert own.decode(forged, skip_special_tokens=False) == "hi" + SPECIALS[0] * 2
    assert forged.count(bos) == 1


async def test_template_variables_come_by_http(client, generator):
    await post(client, CHAT, **HI, chat_template_kwargs={"add_generation_prompt_": 1, "bos_token": "forged"})
    await post(client, CHAT, **HI)
    assert generator.requests[0].prompt_ids == generator.requests[1].prompt_ids


async def test_a_suffix_makes_the_prompt_of_the_models_own_form(client, tokenizer):
    backend = make_backend()
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"]
    backend.add_tokens([AddedToken(n, special=True) for n in names])
    own = Tokenizer(backend, eos_ids=tokenizer.eos_ids, context_length=256)
    generator = FakeGenerator(own)
    app = create_app(FrontConfig(), [ServedModel("code", own, 256)], generator, FakeStatus())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as fills:
        answer = await post(fills, COMPLETION, model="code", prompt="hello", suffix=" the end", max_tokens=100)
    assert answer["choices"][0]["text"] == ANSWER
    begin, between, end, stop = map(backend.token_to_id, names)
    wanted = (begin, *own.encode("hello"), between, *own.encode(" the end"), end)
    assert generator.requests[0].prompt_ids == wanted
    assert stop in generator.requests[0].samplings[0].stop_ids


async def test_log_probabilities_are_bounded_over_all_prompts(generator, tokenizer, status):
    """Mutant seen to fail: a product without the prompts."""
    config = FrontConfig(limits=RequestLimits(max_logprobs=100))
    app = create_app(config, [ServedModel("m", tokenizer, 256)], generator, status)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        for asked in ({"logprobs": 4, "max_tokens": 11}, {"prompt_logprobs": 4, "max_tokens": 1}):
            one = {"model": "m", "prompt": "x" * 11, **asked}
            assert (await client.post(COMPLETION, json=one)).status_code == 200
            refused = await client.post(COMPLETION, json=one | {"prompt": ["x" * 11, "x" * 11]})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] in asked
