"""Generated hostile bodies over a real socket, beside a stream that must not notice.

`pytest --hypothesis-profile=full` runs 2,000 of them, the default profile as many as hypothesis runs anywhere.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel

from .conftest import base_of
from .fakes import ANSWER, FakeGenerator, FakeStatus
from .hostile import CHAT, COMPLETION, HI, INTERACTIVE, MESSAGES, RESPONSES, Attack, attacks, poisoned
from .raw_http import Answer, Connection
from .served import serving
from .strict_json import judge
from .test_other_apis import events_of

NOT_JSON = "We could not parse the JSON body of your request"
MOST_BYTES = 1 << 16
NORMAL = json.dumps({"model": "m", "messages": [HI]}).encode()
ONLOOKER = {"model": "slow", "messages": [HI], "stream": True, "n": 2, "stream_options": {"include_usage": True}}


class ByModel:
    """A generator that takes its time for the model "slow"."""

    def __init__(self, tokenizer: Any) -> None:
        self.usual, self.slow = FakeGenerator(tokenizer), FakeGenerator(tokenizer, pause=0.002)

    async def generate(self, request: Any, sink: Any) -> None:
        await (self.slow if request.model == "slow" else self.usual).generate(request, sink)

    @property
    def running(self) -> int:
        return self.usual.running + self.slow.running

    @property
    def open(self) -> int:
        return sum(len(g.requests) - g.closed for g in (self.usual, self.slow))


class Onlooker(threading.Thread):
    """Streams normal answers, one after the other, until told to leave; `wrong` says what was not exact."""

    def __init__(self, address: tuple[str, int], tokens: int) -> None:
        super().__init__()
        self._connection, self._tokens = Connection(address), tokens
        self.leave = threading.Event()
        self.streams, self.wrong = 0, ""

    def run(self) -> None:
        body = json.dumps(ONLOOKER).encode()
        while not self.leave.is_set() and not self.wrong:
            try:
                self._check(self._connection.post(CHAT, body))
            except (AssertionError, OSError, ValueError) as e:
                self.wrong = f"{type(e).__name__}: {e}"
            self.streams += 1
        self._connection.close()

    def _check(self, answer: Answer) -> None:
        assert answer.status == 200
        *chunks, usage = answer.events
        for index in (0, 1):
            choices = [c for e in chunks for c in e["choices"] if c["index"] == index]
            assert "".join(c["delta"].get("content", "") for c in choices) == ANSWER
            assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
        assert usage["usage"]["completion_tokens"] == 2 * self._tokens


def check_refusal(attack: Attack, answer: Answer) -> None:
    """OpenAI's body or Anthropic's, a 4xx, and not much of the input in it."""
    assert 400 <= answer.status < 500, answer.body
    anthropics = attack.path.startswith(MESSAGES)
    assert set(answer.json) == ({"type", "error"} if anthropics else {"error"})
    error = answer.json["error"]
    assert set(error) == ({"message", "type"} if anthropics else {"message", "type", "param", "code"})
    types = {404: "not_found_error", 413: "request_too_large"} if anthropics else {}
    assert error["type"] == types.get(answer.status, "invalid_request_error")
    assert 0 < len(error["message"]) < 600
    assert error["message"].isprintable()


def check_verdict(attack: Attack, answer: Answer) -> None:
    """A body that is no JSON is refused as such, and for nothing else; one that is, is not."""
    if answer.status == 413:
        assert len(attack.body) > MOST_BYTES
    elif answer.status == 415:
        assert attack.content_type != "application/json"
    else:
        verdict = judge(attack.body)
        error = {} if answer.status == 200 else answer.json["error"]
        refused = error.get("message", "").startswith(NOT_JSON)
        assert not refused or (answer.status, error.get("param"), error.get("code")) == (400, None, None)
        unknown = error.get("code") == "unknown_parameter" or "Unknown parameter" in error.get("message", "")
        assert refused != verdict.is_object or (verdict.long_key and unknown)


def check_answer(attack: Attack, answer: Answer, tokenizer: Any) -> None:
    """What the fake generator says, as far as the body asked for it."""
    body = json.loads(attack.body)
    if attack.path.startswith((RESPONSES, MESSAGES)):
        check_blocks(attack.path, answer, stream=bool(body.get("stream")))
        return
    if attack.path.startswith(INTERACTIVE):
        lines = [json.loads(line) for line in answer.body.splitlines()]
        texts, reasons = {0: "".join(line["text"] for line in lines)}, {0: [lines[-1]["finish_reason"]]}
        usage = {"completion_tokens": lines[-1]["tokens"]}
        assert len(lines) == 1 or body["stream"]
    elif body.get("stream"):
        texts, reasons, usage = from_events(answer.events)
    else:
        whole = answer.json
        texts = {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]}
        reasons = {c["index"]: [c["finish_reason"]] for c in whole["choices"]}
        usage = whole["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert sorted(texts) == list(range(len(texts)))
    assert all(r in (["stop"], ["length"]) for r in reasons.values()), reasons
    assert len(texts) % (body.get("n") or 1) == 0
    echo = body["prompt"] if body.get("echo") and isinstance(body.get("prompt"), str) else ""
    plain = not any(body.get(f) for f in ("stop", "stop_token_ids")) and body.get("skip_special_tokens") is not False
    if body.get("echo") and not echo:
        return
    for text in texts.values():
        assert text.startswith(echo)
        shown = text[len(echo) :].replace("<|im_end|>", "").rstrip("\ufffd")
        assert ANSWER.startswith(shown), text
    if plain and usage and len(texts) == 1:
        made = (tokenizer.encode(ANSWER) + [tokenizer.eos_ids[0]] * 300)[: usage["completion_tokens"]]
        assert texts[0] == echo + tokenizer.decode(made)


def check_blocks(path: str, answer: Answer, *, stream: bool) -> None:
    """All that blocks and items say is what the fake generator says, or the beginning of it."""
    if path.endswith("count_tokens"):
        assert answer.json["input_tokens"] > 0
        return
    if stream:
        events = events_of(answer.body.decode("ascii"))
        deltas = [e["delta"] for e in events if e["type"].endswith(".delta") or e["type"] == "content_block_delta"]
        names = ("text", "thinking", "partial_json")
        said = "".join(d if isinstance(d, str) else next((d[n] for n in names if n in d), "") for d in deltas)
        assert events[-1]["type"] in ("message_stop", "response.completed", "response.incomplete")
    elif path == RESPONSES:
        items = answer.json["output"]
        said = "".join(i["arguments"] if "arguments" in i else i["content"][0]["text"] for i in items)
    else:
        names = ("text", "thinking")
        blocks = answer.json["content"]
        said = "".join(next((b[n] for n in names if n in b), b.get("input", {}).get("INVALID_JSON")) for b in blocks)
    assert ANSWER.startswith(said.replace("<|im_end|>", "").rstrip("\ufffd")), said


def from_events(events: list[Any]) -> tuple[dict[int, str], dict[int, list[str]], Any]:
    texts: dict[int, str] = {}
    reasons: dict[int, list[str]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for c in event["choices"]:
            piece = c["text"] if "text" in c else c["delta"].get("content", "")
            texts[c["index"]] = texts.get(c["index"], "") + piece
            reasons.setdefault(c["index"], []).extend([c["finish_reason"]] if c["finish_reason"] else [])
    return texts, reasons, usage


@pytest.mark.slow
def test_generated_bodies_over_a_socket(tokenizer: Any) -> None:
    """No 5xx, no hang: OpenAI's error or a right answer, and a right answer to the next request."""
    generator = ByModel(tokenizer)
    models = [
        ServedModel("m", tokenizer, 256),
        ServedModel("slow", tokenizer, 256),
        ServedModel("org/base", base_of(tokenizer), 256),
        ServedModel("t", tokenizer, 256, tool_parser="hermes", reasoning_parser="qwen3"),
    ]
    app = create_app(FrontConfig(max_body_bytes=MOST_BYTES), models, generator, FakeStatus())
    seen: dict[int, int] = {}
    with serving(app) as address:
        onlooker = Onlooker(address, len(tokenizer.encode(ANSWER)) + 1)
        onlooker.start()
        connection = Connection(address)

        def attack_it(attack: Attack) -> None:
            answer = connection.post(attack.path, attack.body, attack.content_type, attack.pieces)
            seen[answer.status] = seen.get(answer.status, 0) + 1
            assert answer.headers["x-request-id"]
            if answer.status == 200:
                check_answer(attack, answer, tokenizer)
            else:
                check_refusal(attack, answer)
            check_verdict(attack, answer)
            after = connection.post(CHAT, NORMAL)
            assert after.json["choices"][0]["message"]["content"] == ANSWER

        generated = given(attacks())(attack_it)
        generated = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(generated)
        try:
            for attack in poisoned():
                attack_it(attack)
            generated()
        finally:
            onlooker.leave.set()
            onlooker.join()
            connection.close()
    assert onlooker.wrong == ""
    assert onlooker.streams
    assert (generator.running, generator.open) == (0, 0)
    print(f"{sum(seen.values())} bodies beside {onlooker.streams} streams: {dict(sorted(seen.items()))}")
    assert {200, 400} <= set(seen)


def test_the_checks_can_fail(tokenizer: Any) -> None:
    attack = Attack(COMPLETION, b'{"model":"m","prompt":"x"}', None, 0)
    choices = [{"index": 0, "text": ANSWER[:4], "finish_reason": "length"}]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    wrong = Answer(200, {}, json.dumps({"choices": choices, "usage": usage}).encode(), closes=False)
    with pytest.raises(AssertionError):
        check_answer(attack, wrong, tokenizer)
    with pytest.raises(AssertionError):
        check_refusal(attack, Answer(500, {}, b"{}", closes=False))
    field = {"error": {"message": "Invalid 'a'.", "type": "invalid_request_error", "param": "a", "code": None}}
    by_field = Answer(400, {}, json.dumps(field).encode(), closes=False)
    for attack in poisoned():
        with pytest.raises(AssertionError):
            check_verdict(attack, wrong)
        with pytest.raises(AssertionError):
            check_verdict(attack, by_field)
    parse = {"error": {"message": f"{NOT_JSON}: x.", "type": "invalid_request_error", "param": None, "code": None}}
    with pytest.raises(AssertionError):
        check_verdict(Attack(CHAT, NORMAL, None, 0), Answer(400, {}, json.dumps(parse).encode(), closes=False))
