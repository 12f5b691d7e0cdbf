"""Tool calls and thoughts of every family, whole and cut at every place: the same parts."""

from __future__ import annotations

import json

import pytest

from router.parsers.calls import FAMILIES, REQUIRED, TOOL_PARSERS, MarkedCalls, NamedCall, family_of, tool_parser
from router.parsers.pieces import Arguments, CallBegins, ParsedMessage, Parser, Plain
from router.parsers.reasoning import REASONING_PARSERS, ReasoningParser, reasoning_of

A, B = {"city": 'Oslo "}]', "n": [1, {"x": None}]}, {}
ONE, TWO = json.dumps(A), json.dumps(B)


def read(parser: Parser, parts: list[str]) -> ParsedMessage:
    message = ParsedMessage()
    for part in parts:
        message.add(parser.push(part))
    message.add(parser.flush())
    return message


def of(message: ParsedMessage) -> tuple[str | None, str, list[tuple[str, object]]]:
    return message.content, message.reasoning, [(c.name, json.loads(c.arguments)) for c in message.calls]


def every_cut(text: str) -> list[list[str]]:
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]


CALLS = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {ONE}}}\n</tool_call>\n'
    f'<tool_call>{{"arguments":{TWO},"name":"g"}}</tool_call>',
    "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {ONE}}}, {{"name": "g", "arguments": {TWO}}}]',
    "mistral named": f"[TOOL_CALLS]f[ARGS]{ONE}[TOOL_CALLS]g{TWO}",
    "internlm": f'<|action_start|><|plugin|>\n{{"name": "f", "parameters": {ONE}}}<|action_end|>\n'
    f'<|action_start|><|plugin|>{{"name": "g"}}<|action_end|>',
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{ONE}\n```"
    "<｜tool▁call▁end｜>\n"
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{TWO}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek named": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{ONE}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>{TWO}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama3_json": f'{{"name": "f", "parameters": {ONE}}}; {{"name": "g", "parameters": {TWO}}}',
    "llama3_json tag": f'<|python_tag|>{{"name": "f", "parameters": {ONE}}};'
    f'{{"name": "g", "parameters": {json.dumps(TWO)}}}',
    "pythonic": "[f(city='Oslo \"}]', n=[1, {'x': None}]), g()]",
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_however_they_are_cut(case: str) -> None:
    for parts in every_cut(CALLS[case]):
        assert of(read(tool_parser(case.split()[0]), parts)) == (None, "", [("f", A), ("g", B)]), parts
    one = of(read(tool_parser(case.split()[0], parallel=False), [CALLS[case]]))
    assert one == (None, "", [("f", A)])


@pytest.mark.parametrize("case", [case for case in CALLS if case.split()[0] not in ("llama3_json", "pythonic")])
def test_what_stands_before_is_content(case: str) -> None:
    for parts in every_cut("I look. <tool [\n\n" + CALLS[case])[:40]:
        assert of(read(tool_parser(case.split()[0]), parts)) == ("I look. <tool [", "", [("f", A), ("g", B)]), parts


@pytest.mark.parametrize("family", TOOL_PARSERS)
@pytest.mark.parametrize(
    "text",
    ["Just a text.\n", "", " [1] {2} <tool_calls", '{"answer": 1}', "[1, 2]", "[f(1)]", "<tool_call>?</tool_call> x"],
)
def test_what_is_no_call_is_content(family: str, text: str) -> None:
    for parts in every_cut(text):
        assert read(tool_parser(family), parts).content == text, parts


def test_arguments_come_as_they_grow() -> None:
    parser = tool_parser("hermes")
    assert parser.push('<tool_call>{"name": "f", "argum') == []
    begun = parser.push('ents": {"a')
    assert isinstance(begun[0], CallBegins)
    assert begun[1:] == [Arguments(0, '{"a')]
    assert parser.push('": 1') == [Arguments(0, '": 1')]


def test_a_cut_call_keeps_what_there_is() -> None:
    message = read(tool_parser("hermes"), ['<tool_call>{"name": "f", "arguments": {"a": [1'])
    assert [(call.name, call.arguments) for call in message.calls] == [("f", '{"a": [1')]
    assert read(tool_parser("hermes"), ['x <tool_call>{"na']).content == 'x <tool_call>{"na'


def test_required_calls_and_a_named_one() -> None:
    text = f'[{{"name": "f", "parameters": {ONE}}} ,{{"name":"g","parameters":{TWO}}}]'
    for parts in every_cut(text):
        assert of(read(MarkedCalls(REQUIRED), parts)) == (None, "", [("f", A), ("g", B)])
    assert of(read(NamedCall("f"), list(ONE))) == (None, "", [("f", A)])


def test_ids_are_those_that_templates_take() -> None:
    (call,) = read(tool_parser("mistral", parallel=False), [CALLS["mistral"]]).calls
    assert len(call.id) == 9
    first, second = read(tool_parser("hermes"), [CALLS["hermes"]]).calls
    assert first.id.startswith("call_")
    assert first.id != second.id


@pytest.mark.parametrize(
    ("name", "inside", "text", "expected"),
    [
        ("qwen3", False, "<think>\nWell.\n\nSo.\n</think>\n\nYes.\n", ("Yes.\n", "Well.\n\nSo.")),
        ("qwen3", True, "Well.</think>Yes.", ("Yes.", "Well.")),
        ("qwen3", True, "<think>Well.</think>Yes.", ("Yes.", "Well.")),
        ("qwen3", False, "Yes. <think>", ("Yes. <think>", "")),
        ("qwen3", False, "<thin", ("<thin", "")),
        ("deepseek_r1", False, "Well.</think>\n\nYes.", ("Yes.", "Well.")),
        ("deepseek_r1", False, "Well, cut </thi", ("", "Well, cut </thi")),
        ("granite", False, "Here is my thought process:\nWell.\nHere is my response: Yes.", ("Yes.", "Well.")),
        ("mistral", False, "[THINK]Well.[/THINK]Yes.", ("Yes.", "Well.")),
    ],
    ids=range(9),
)
def test_thoughts_however_they_are_cut(name: str, inside: bool, text: str, expected: tuple[str, str]) -> None:
    for parts in every_cut(text):
        message = read(ReasoningParser(REASONING_PARSERS[name], Plain(), inside=inside), parts)
        assert (message.content, message.reasoning) == expected, parts


def test_calls_after_thoughts() -> None:
    for parts in every_cut("<think>I <tool_call> it</think>\n" + CALLS["hermes"])[:60]:
        parser = ReasoningParser(REASONING_PARSERS["qwen3"], tool_parser("hermes"), inside=False)
        assert of(read(parser, parts)) == (None, "I <tool_call> it", [("f", A), ("g", B)])


def test_templates_tell_their_family() -> None:
    assert {name: family_of(f"x {family.shown_by[0]} y") for name, family in FAMILIES.items()} == {
        name: name for name in FAMILIES
    }
    assert family_of("{{ messages }}") is None
    assert (reasoning_of("a </think> b"), reasoning_of("[THINK]"), reasoning_of("")) == ("qwen3", "mistral", None)
