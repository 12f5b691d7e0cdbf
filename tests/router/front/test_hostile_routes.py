"""Generated hostile bodies for the routes and parameters beside plain chats: tokens, sessions, tools, grammars, nodes.

Never a 5xx, never a hang: OpenAI's error or an answer of the right form, and a right answer to the next request. As
`test_hostile`, with `--hypothesis-profile=full` 2,000 of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from router.dispatch.lease import AddNode, NodeAnswer, RemoveNode, ReplicaTable
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.text.tokenizer import Tokenizer

from .conftest import base_of
from .fakes import ANSWER, TOOLS_TEMPLATE, FakeGenerator, FakeStatus
from .hostile import CHAT, COMPLETION, HI, INTERACTIVE, Attack, attacks
from .raw_http import Answer, Connection
from .served import serving
from .test_hostile import MOST_BYTES, NORMAL, check_refusal, check_verdict
from .test_tools import TIME, WEATHER

SESSION = {"session_id": 5, "interactive_mode": True, "request_output_len": 5}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}}, "required": ["a"]}
ASKED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}  # fmt: skip
CHOICE = {"type": "function", "function": {"name": "time"}}
CHATTED = {"model": "m", "messages": [HI], "max_tokens": 6}
COMPLETED = {"model": "m", "prompt": "hi", "max_tokens": 6}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"model": "m", "prompt": "hi", "max_tokens": 6, "return_logprob": True, "bad_words": ["wör"]}),
    ("/generate", {"model": "m", "input_ids": [40, 41], "stream": True, "stop": ["zz"], "session_id": 3}),
    ("/tokenize", {"model": "m", "prompt": "hi", "return_token_strs": True, "add_special_tokens": False}),
    ("/tokenize", {"model": "m", "messages": [HI], "add_generation_prompt": True, "chat_template_kwargs": {"a": 1}}),
    ("/detokenize", {"model": "m", "tokens": [40, 41, 42]}),
    ("/v1/encode", {"model": "m", "input": ["a", "b"], "do_preprocess": False, "add_bos": True}),
    (INTERACTIVE, {"model": "m", "prompt": "hi", **SESSION}),
    (INTERACTIVE, {"model": "m", "prompt": [HI], "stream": True, **SESSION}),
    (INTERACTIVE, {"prompt": "", "session_id": 5, "cancel": True}),
    (INTERACTIVE, {"model": "m", "prompt": "x", "session_id": 5, "interactive_mode": False}),
    (f"{INTERACTIVE}_qos", {"model": "m", "prompt": "hi", "user_id": "u", **SESSION}),
    (CHAT, {**CHATTED, "tools": [WEATHER, TIME], "tool_choice": "auto", "parallel_tool_calls": False}),
    (CHAT, {**CHATTED, "tools": [WEATHER], "stream": True, "tool_choice": CHOICE | {"function": {"name": "weather"}}}),
    (CHAT, {**CHATTED, "messages": [HI, ASKED, {"role": "tool", "tool_call_id": "c1", "content": "4"}]}),
    (CHAT, {**CHATTED, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}),
    (CHAT, {**CHATTED, "response_format": {"type": "json_object"}, "stream": True}),
    (CHAT, {**CHATTED, "structured_outputs": {"regex": "[a-z]{1,5}"}}),
    (COMPLETION, {**COMPLETED, "structured_outputs": {"choice": ["yes", "no"]}}),
    (COMPLETION, {**COMPLETED, "structured_outputs": {"grammar": 'start: "a" | "b"'}}),
    (COMPLETION, {**COMPLETED, "best_of": 3, "n": 2}),
    (COMPLETION, {**COMPLETED, "bad_words": ["wör", "x"], "min_p": 0.1, "stream": True}),
    (CHAT, {**CHATTED, "prompt_logprobs": 1}),
    (COMPLETION, {**COMPLETED, "prompt": ["hi", "a"], "echo": True, "logprobs": 1, "prompt_logprobs": 0}),
    (CHAT, {**CHATTED, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (CHAT, {**CHATTED, "bad_words": ["a b"], "logprobs": True, "top_logprobs": 1}),
    ("/nodes/add", {"url": "http://127.0.0.1:9", "status": {"models": ["a"], "speed": 2.0}, "key": "k"}),
    ("/nodes/remove", {"url": "http://127.0.0.1:9"}),
]
KNOWN = {
    "/tokenize": {"count", "max_model_len", "tokens", "token_strs"},
    "/detokenize": {"prompt"},
    "/v1/encode": {"input_ids", "length"},
    "/nodes/add": {"message", "url"},
    "/nodes/remove": {"message", "url"},
}


class FakeNodes:
    """A dispatcher that takes every node whose address ends in 9."""

    name, connected, table_at = "front", True, 0.0
    rows: tuple[Any, ...] = ()
    table = ReplicaTable((), 0)

    def __init__(self) -> None:
        self.on_opened: list[Callable[[], None]] = []

    async def ask(self, question: Callable[[int], Any], seconds: float = 0.0) -> NodeAnswer:
        message = question(1)
        assert isinstance(message, AddNode | RemoveNode), message
        return NodeAnswer(1, "" if message.url.endswith("9") else "does not answer")


def check_form(attack: Attack, answer: Answer) -> None:
    """An answer of the route's form."""
    body = json.loads(attack.body)
    if attack.path in KNOWN:
        assert set(answer.json) == KNOWN[attack.path]
        return
    if attack.path.startswith(INTERACTIVE):
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert len(lines) == 1 or body["stream"]
        assert all("text" in line or body["cancel"] for line in lines)
        return
    events = answer.events if body.get("stream") else [answer.json]
    for event in events:
        assert "error" not in event, event
        assert "text" in event or "choices" in event
    made = [c for event in events for c in event.get("choices", ())]
    assert attack.path == "/generate" or any(c["finish_reason"] for c in made)


@pytest.mark.slow
def test_generated_bodies_for_other_routes(tokenizer: Any, model_folder: Any) -> None:
    generator = FakeGenerator(tokenizer)
    with_tools = Tokenizer.from_folder(model_folder, trust_template=True, template=TOOLS_TEMPLATE)
    models = [
        ServedModel("m", with_tools, 1024, tool_parser="hermes", reasoning_parser="qwen3"),
        ServedModel("org/base", base_of(tokenizer), 256),
    ]
    nodes: Any = FakeNodes()
    app = create_app(FrontConfig(max_body_bytes=MOST_BYTES), models, generator, FakeStatus(), nodes=nodes)
    seen: dict[tuple[str, int], int] = {}
    with serving(app) as address:
        connection = Connection(address)

        def attack_it(attack: Attack) -> None:
            answer = connection.post(attack.path, attack.body, attack.content_type, attack.pieces)
            seen[attack.path, answer.status] = seen.get((attack.path, answer.status), 0) + 1
            assert answer.headers["x-request-id"]
            if answer.status == 200:
                check_form(attack, answer)
            elif attack.path == "/nodes/add" and answer.status == 502:
                assert answer.json["error"]["code"] == "node_failed"
            else:
                check_refusal(attack, answer)
            check_verdict(attack, answer)
            after = connection.post(CHAT, NORMAL)
            assert after.json["choices"][0]["message"]["content"] == ANSWER

        try:
            for path, body in GOOD:
                attack_it(Attack(path, json.dumps(body).encode(), "application/json", 0))
                assert seen.keys() == {(path, 200) for path, _ in seen}, body
            generated = given(attacks(GOOD))(attack_it)
            settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(generated)()
        finally:
            connection.close()
    assert (generator.running, len(generator.requests) - generator.closed) == (0, 0)
    print(f"{sum(seen.values())} bodies: {dict(sorted(seen.items()))}")
