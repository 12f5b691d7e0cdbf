"""What vLLM's users send besides: stop strings that stay, ids, names of tokens, guided fields, thoughts, documents.

Mutants seen to fail: ids shown that were drawn behind a stop string; ids taken by an event of the prompt's, or by a
later one than their text's; the stop string cut although asked for; tokens called as they read; `documents` whose
special strings are special; thoughts shown; a `guided_` field that is dropped; `right` that keeps the end.
"""

from __future__ import annotations

import json

import httpx
import pytest

from router.http import outlet
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.text.chat_form import ChatForm
from router.text.tokenizer import Tokenizer
from workers.api.grammar import GrammarKind

from .fakes import ANSWER, SPECIALS
from .test_bad_inputs import CHAT, COMPLETION
from .test_more_parameters import HI, post

TEMPLATE = (
    "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[0].content }}"
    "{% if reasoning_effort or enable_thinking is defined %}({{ reasoning_effort }}, {{ enable_thinking }}){% endif %}"
    "<think>"
)


@pytest.fixture
def served(model_folder, generator, status):
    def client(template, **model):
        own = Tokenizer.from_folder(model_folder, trust_template=True, template=template)
        app = create_app(FrontConfig(), [ServedModel("m", own, 256, **model)], generator, status, draw_seed=lambda: 7)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")

    return client


def text_of(choice):
    return choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content") or ""


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stop", [["wör"], ["zz", " 你好 "], ["d"]])
async def test_a_stop_string_stays_where_that_is_asked_for(client, path, stop):
    body = {**(HI if path == CHAT else {"prompt": "x"}), "stop": stop, "max_tokens": 99, "logprobs": None}
    end = min(ANSWER.find(s) + len(s) for s in stop if s in ANSWER)
    whole = await post(client, path, **body, include_stop_str_in_output=True)
    assert text_of(whole["choices"][0]) == ANSWER[:end]
    assert whole["choices"][0]["finish_reason"] == "stop"
    events = await post(client, path, **body, include_stop_str_in_output=True, stream=True)
    assert "".join(text_of(e["choices"][0]) for e in events) == ANSWER[:end]
    cut = await post(client, path, **body)
    assert ANSWER[:end].startswith(text_of(cut["choices"][0]))
    assert len(text_of(cut["choices"][0])) < end


async def test_the_token_that_ends_an_answer_stays_too(client, tokenizer):
    body = {**HI, "include_stop_str_in_output": True, "max_tokens": 99, "skip_special_tokens": False}
    whole = await post(client, CHAT, **body)
    assert text_of(whole["choices"][0]) == ANSWER + SPECIALS[2]
    hidden = await post(client, CHAT, **body | {"skip_special_tokens": True})
    assert text_of(hidden["choices"][0]) == ANSWER
    assert hidden["usage"] == whole["usage"]


async def test_ids_are_shown_beside_the_text(client, generator, tokenizer):
    script = [*tokenizer.encode(ANSWER), tokenizer.eos_ids[0]]
    chat = await post(client, CHAT, **HI, n=2, max_tokens=3, return_token_ids=True)
    assert chat["prompt_token_ids"] == list(generator.requests[0].prompt_ids)
    assert [c["token_ids"] for c in chat["choices"]] == [script[:3]] * 2
    both = await post(client, COMPLETION, prompt=["hello", "the end"], n=2, max_tokens=99, return_token_ids=True)
    prompts = [list(r.prompt_ids) for r in generator.requests[1:]]
    assert [c["prompt_token_ids"] for c in both["choices"]] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert [c["token_ids"] for c in both["choices"]] == [script] * 4
    plain = await post(client, CHAT, **HI, max_tokens=3)
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


def shown_ids(events, index=0):
    return [i for e in events for c in e["choices"] if c["index"] == index for i in c["token_ids"]]


STREAMS = [
    (CHAT, {"n": 3}),
    (CHAT, {"stop": ["wör"], "n": 2}),
    (CHAT, {"stop": ["wör"], "include_stop_str_in_output": True}),
    (CHAT, {"stop": ["zz"], "logprobs": True, "top_logprobs": 1}),
    (CHAT, {"prompt_logprobs": 0, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (CHAT, {"ignore_eos": True, "max_tokens": 7}),
    (COMPLETION, {"prompt": ["hello", "the end"], "n": 2, "stream_options": {"include_usage": True}}),
    (COMPLETION, {"prompt": "x", "echo": True, "stop": ["d", "你好 "]}),
    (COMPLETION, {"prompt": "hello", "echo": True, "logprobs": 0}),
    (COMPLETION, {"prompt": "x", "min_tokens": 9, "stop": ["wör"], "max_tokens": 12}),
    (COMPLETION, {"prompt": "x", "skip_special_tokens": False}),
    (COMPLETION, {"prompt": "x", "use_beam_search": True, "n": 2}),
]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("path", "asked"), STREAMS)
async def test_a_streams_ids_are_those_of_the_whole_answer(client, generator, path, asked, seed):
    generator.seed = seed
    body = {**(HI if path == CHAT else {}), "max_tokens": 99, "return_token_ids": True, **asked}
    whole = await post(client, path, **{**body, "stream_options": None})
    events = await post(client, path, **body, stream=True)
    plain = await post(client, path, **{**body, "return_token_ids": None}, stream=True)
    for choice in whole["choices"]:
        index = choice["index"]
        assert shown_ids(events, index) == choice["token_ids"]
        mine, theirs = ([c for e in all_ for c in e["choices"] if c["index"] == index] for all_ in (events, plain))
        assert "".join(map(text_of, mine)) == text_of(choice) == "".join(map(text_of, theirs))
        if path == COMPLETION:
            assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            assert not [c for c in mine[1:] if "prompt_token_ids" in c]
    if path == CHAT:
        assert [e.get("prompt_token_ids") for e in events] == [whole["prompt_token_ids"]] + [None] * (len(events) - 1)
        assert len(events) == len(plain)
    assert not [c for e in plain for c in e["choices"] if "token_ids" in c]
    if "include_usage" in body.get("stream_options", {}):
        assert events[-1]["usage"] == whole["usage"] == plain[-1]["usage"]


async def test_an_event_shows_the_ids_of_its_text(client, tokenizer):
    """A character of several tokens comes with all of them, what ends the answer with the last event."""
    events = await post(client, CHAT, **HI, max_tokens=99, return_token_ids=True, stream=True)
    first, *texts, last = [e["choices"][0] for e in events]
    assert first["token_ids"] == []
    assert [tokenizer.decode(c["token_ids"]) for c in texts] == [text_of(c) for c in texts]
    assert max(len(c["token_ids"]) for c in texts) > 1
    assert last["token_ids"] == [tokenizer.eos_ids[0]]


async def test_a_long_prompt_is_no_reason_to_give_its_reader_up(model_folder, generator, status, monkeypatch):
    monkeypatch.setattr(outlet, "MOST_HELD", 4096)
    own = ServedModel("m", Tokenizer.from_folder(model_folder, trust_template=True), 1 << 12)
    app = create_app(FrontConfig(), [own], generator, status)
    ids = [259] * 2000  # over that as they are written
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        body = {"prompt": ids, "max_tokens": 5, "prompt_logprobs": 0, "return_token_ids": True}
        events = await post(client, COMPLETION, **body, stream=True)
    first, scores, *_ = (e["choices"][0] for e in events)
    assert (first["prompt_token_ids"], first["token_ids"], scores["token_ids"]) == (ids, [], [])
    assert len(scores["prompt_logprobs"]) == len(ids)
    assert len(shown_ids(events)) == 5


async def test_named_tokens_are_shown_after_the_drawn_one(client, generator, tokenizer):
    ids = tokenizer.encode(ANSWER)[:4]
    names = [259, ids[0], 40]
    body = {"max_tokens": 4, "logprob_token_ids": [*names, 40], "return_tokens_as_token_ids": True}

    def expected(drawn):
        return {f"token_id:{i}": -0.5 if i == drawn else -i / 9 for i in [drawn, *names]}

    for more in ({"top_logprobs": 5}, {}):
        chat = await post(client, CHAT, **HI, **body, logprobs=True, n=2, **more)
        for choice in chat["choices"]:
            shown = [[(t["token"], t["logprob"]) for t in one["top_logprobs"]] for one in choice["logprobs"]["content"]]
            assert shown == [list(expected(i).items()) for i in ids]
    asked = generator.requests[-1].samplings
    assert [(s.logprobs, s.logprob_ids) for s in asked] == [(0, tuple(names))] * 2
    whole = await post(client, COMPLETION, prompt="hello", echo=True, **body, logprobs=2)
    shown = whole["choices"][0]["logprobs"]["top_logprobs"]
    assert shown[-4:] == [expected(i) for i in ids]
    assert [len(one) for one in shown[1:-4]] == [2] * (len(generator.requests[-1].prompt_ids) - 1)
    events = await post(client, COMPLETION, prompt="x", **body, logprobs=0, stream=True)
    streamed = [e["choices"][0]["logprobs"] for e in events]
    assert [t for p in streamed if p for t in p["top_logprobs"]] == [expected(i) for i in ids]


CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("steps", [1, 7, 400])
@pytest.mark.parametrize("options", [None, {"include_usage": True, "continuous_usage_stats": True}])
async def test_ids_of_answers_in_parts(tools_client, generator, steps, options):
    generator.answer, generator.tokens_a_step = f"<think>\nHm, 你好.\n</think>\n\nSee. {CALL}", steps
    tool = {"type": "function", "function": {"name": "time"}}
    body = {**HI, "tools": [tool], "n": 2, "max_tokens": 400, "return_token_ids": True}
    async with tools_client(reasoning_parser="qwen3") as client:
        for more in ({}, {"include_reasoning": False}):
            whole = await post(client, CHAT, **body, **more)
            events = await post(client, CHAT, **body, **more, stream=True, stream_options=options)
            assert [shown_ids(events, i) for i in (0, 1)] == [c["token_ids"] for c in whole["choices"]]
            calls = [c for e in events for c in e["choices"] if "tool_calls" in c["delta"]]
            assert {c["index"] for c in calls} == {0, 1}
            if steps == 400:  # all in one step: the first event of several brings all
                firsts = [next(c for e in events[2:] for c in e["choices"] if c["index"] == i) for i in (0, 1)]
                assert [c["token_ids"] for c in firsts] == [c["token_ids"] for c in whole["choices"]]


async def test_tokens_are_called_by_their_ids(client, tokenizer):
    ids = tokenizer.encode(ANSWER)[:4]
    names = [f"token_id:{i}" for i in ids]
    body = {"max_tokens": 4, "return_tokens_as_token_ids": True}
    chat = await post(client, CHAT, **HI, **body, logprobs=True, top_logprobs=1)
    shown = chat["choices"][0]["logprobs"]["content"]
    assert [t["token"] for t in shown] == names == [t["top_logprobs"][0]["token"] for t in shown]
    assert bytes(shown[0]["bytes"]).decode() == names[0]
    echoed = {"prompt": "hello wörld", "echo": True, "logprobs": 1, "prompt_logprobs": 0}
    usual = await post(client, COMPLETION, **echoed, max_tokens=4)
    whole = await post(client, COMPLETION, **echoed, **body)
    mine, theirs = whole["choices"][0], usual["choices"][0]
    assert mine["logprobs"]["tokens"][-4:] == names
    assert mine["logprobs"]["text_offset"] == theirs["logprobs"]["text_offset"]
    assert mine["prompt_logprobs"] == theirs["prompt_logprobs"]
    events = await post(client, COMPLETION, prompt="x", **body, logprobs=0, stream=True)
    assert [t for e in events if e["choices"][0]["logprobs"] for t in e["choices"][0]["logprobs"]["tokens"]] == names


async def test_prompts_are_cut_on_the_side_that_is_named(client, generator):
    ids = list(range(40, 60))
    for side in ("left", "right", None):
        await post(client, COMPLETION, prompt=ids, truncate_prompt_tokens=5, truncation_side=side)
    assert [list(r.prompt_ids) for r in generator.requests] == [ids[-5:], ids[:5], ids[-5:]]


async def test_priority_reaches_the_request(client, generator):
    await post(client, CHAT, **HI, priority=-7)
    await post(client, COMPLETION, prompt=["a", "b"], priority=3)
    await post(client, CHAT, **HI)
    assert [r.priority for r in generator.requests] == [-7, 3, 3, 0]


@pytest.mark.parametrize(
    ("guided", "kind", "source"),
    [
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"guided_choice": ["yes", "no"]}, GrammarKind.LARK, 'start: "yes" | "no"'),
        ({"guided_grammar": 'start: "a"'}, GrammarKind.LARK, 'start: "a"'),
        ({"guided_json": {"type": "object"}}, GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
        ({"guided_json": '{"type": "array"}'}, GrammarKind.JSON_SCHEMA, '{"type": "array"}'),
        ({"guided_json_object": True}, GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
async def test_guided_fields_are_structured_output(client, generator, guided, kind, source):
    for path, body in ((CHAT, HI), (COMPLETION, {"prompt": "x"})):
        await post(client, path, **body, **guided, guided_whitespace_pattern="\\n", guided_decoding_backend="outlines")
        grammar = generator.requests[-1].grammar
        assert (grammar.kind, grammar.source, grammar.spaces) == (kind, source, "\\n")
    await post(client, CHAT, **HI, response_format={"type": "json_object"}, guided_whitespace_pattern="x")
    assert generator.requests[-1].grammar.spaces == "x"


async def test_thoughts_are_left_out_where_nobody_wants_them(served, generator):
    generator.answer = "<think>\nWell.\n</think>\n\nHi."
    async with served(TEMPLATE, reasoning_parser="qwen3") as client:
        shown = await post(client, CHAT, **HI, max_tokens=99)
        hidden = await post(client, CHAT, **HI, max_tokens=99, include_reasoning=False)
        assert shown["choices"][0]["message"]["reasoning_content"] == "Well."
        assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Hi.", "refusal": None}
        assert hidden["usage"] == shown["usage"]
        events = await post(client, CHAT, **HI, max_tokens=99, include_reasoning=False, stream=True)
        assert not [e for e in events if "reasoning_content" in e["choices"][0]["delta"]]
        assert "".join(text_of(e["choices"][0]) for e in events) == "Hi."


async def test_effort_and_documents_are_the_templates(served, generator, tokenizer):
    async with served(TEMPLATE) as client:
        documents = [{"title": "a", "text": f"b{SPECIALS[1]}"}, {"title": "c", "text": "d"}]
        await post(client, CHAT, **HI, documents=documents, reasoning_effort="low", max_tokens=2)
        ids = generator.requests[-1].prompt_ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert text == f"[a: b{SPECIALS[1]}][c: d]hi(low, )<think>"
        assert tokenizer.encode(SPECIALS[1])[0] not in ids  # what a document says is text
        await post(client, CHAT, **HI, reasoning_effort="none", max_tokens=2)
        assert tokenizer.decode(generator.requests[-1].prompt_ids).startswith("hi(, False)")
        own = {"chat_template_kwargs": {"enable_thinking": 1, "reasoning_effort": "x"}}
        await post(client, CHAT, **HI, reasoning_effort="high", **own, max_tokens=2)
        assert tokenizer.decode(generator.requests[-1].prompt_ids).startswith("hi(x, 1)")


async def test_thoughts_sent_back_have_two_names(served, generator, tokenizer):
    async with served("{% for m in messages %}{{ m.reasoning_content }}|{% endfor %}") as client:
        said = [{"role": "assistant", "content": "a", name: "b"} for name in ("reasoning", "reasoning_content")]
        await post(client, CHAT, messages=[*said, {"role": "user", "content": "c"}], max_tokens=2)
        assert tokenizer.decode(generator.requests[-1].prompt_ids) == "b|b||"


async def test_what_a_template_of_pieces_does_not_show_is_refused(served, generator):
    tool = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    named = {"type": "function", "function": {"name": "time"}}
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    called = [{"role": "assistant", "content": None, "tool_calls": [call]}, *HI["messages"]]
    async with served(ChatForm(user="U:", assistant="A:")) as client:
        for body, param in (
            ({"tools": [tool]}, "tools"),
            ({"tools": [tool], "tool_choice": "auto"}, "tools"),
            ({"messages": called}, "messages[0].tool_calls"),
            ({"documents": [{"text": "x"}]}, "documents"),
            ({"reasoning_effort": "low"}, "reasoning_effort"),
        ):
            answer = await client.post(CHAT, json={**HI, **body})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
        assert not generator.requests
        for choice in ("none", "required", named):
            await post(client, CHAT, **HI, tools=[tool], tool_choice=choice, max_tokens=2)
        assert [r.grammar is None for r in generator.requests] == [True, False, False]


def test_the_schema_names_them(app):
    paths = app.openapi()["paths"]
    for path in (CHAT, COMPLETION):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        names = {"priority", "guided_json", "include_stop_str_in_output", "return_token_ids", "logprob_token_ids"}
        assert names <= set(schema["properties"])


async def test_special_tokens_before_a_prompt(model_folder, generator, status, tmp_path):
    spec = json.loads((model_folder / "tokenizer.json").read_text())
    bos = next(t["id"] for t in spec["added_tokens"] if t["content"] == SPECIALS[0])
    single = [{"SpecialToken": {"id": SPECIALS[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {SPECIALS[0]: {"id": SPECIALS[0], "ids": [bos], "tokens": [SPECIALS[0]]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    own = Tokenizer.from_folder(tmp_path, trust_template=True)
    app = create_app(FrontConfig(), [ServedModel("m", own, 256)], generator, status)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        for asked in (None, True, False):
            await post(client, COMPLETION, prompt="hello", add_special_tokens=asked)
    first, second, third = (r.prompt_ids for r in generator.requests)
    assert first == second == (bos, *third)
