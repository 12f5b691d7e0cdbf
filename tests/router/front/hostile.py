"""Generated bad requests: good bodies, mutated in their structure, types, numbers, text and bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from .fakes import SPECIALS
from .test_json_entry import FIELDS

CHAT, COMPLETION, INTERACTIVE = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HI = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'}
USED = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"], "additionalProperties": False}
GOOD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": "m", "messages": [HI], "max_tokens": 4}),
    (CHAT, {"model": "m", "messages": [HI], "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"model": "m", "messages": [HI, {"role": "assistant", "content": "x"}, HI], "n": 3, "seed": 7}),
    (CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "top_k": 5}),
    (CHAT, {"model": "m", "messages": [HI], "logprobs": True, "top_logprobs": 2, "stop": ["wör", "zz"]}),
    (CHAT, {"model": "m", "messages": [HI], "logit_bias": {"40": 5, "41": -100}, "metadata": {"a": "b"}, "user": "u"}),
    (CHAT, {"model": "m", "messages": [HI], "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "ignore_eos": True}),
    (CHAT, {"model": "m", "messages": [HI, {"role": "assistant", "content": "It"}], "continue_final_message": True}),
    (COMPLETION, {"model": "m", "prompt": "hi", "echo": True, "max_tokens": 9}),
    (COMPLETION, {"model": "m", "prompt": [40, 41, 42], "stream": True, "presence_penalty": 1.5}),
    (COMPLETION, {"model": "m", "prompt": ["a", "b"], "n": 2, "logprobs": 1, "stop_token_ids": [50]}),
    (COMPLETION, {"model": "m", "prompt": [[40], [41]], "stream": True, "n": 2, "min_tokens": 3, "max_tokens": 12,
                  "return_token_ids": True}),
    (f"{CHAT}_qos", {"model": "m", "messages": "hi", "stop": False, "session_id": -1, "user_id": "u"}),
    (f"{COMPLETION}_qos", {"model": "m", "prompt": "hi", "suffix": "s", "user_id": "u", "stream": True}),
    (INTERACTIVE, {"model": "m", "prompt": "hi", "session_id": 1, "stream": True, "request_output_len": 9}),
    (f"{INTERACTIVE}_qos", {"model": "m", "prompt": [HI], "stop": False, "image_url": None, "user_id": "u"}),
    (COMPLETION, {"model": "org/base", "prompt": "x" * 300, "truncate_prompt_tokens": 9, "request_id": "r-1"}),
    (CHAT, {"model": "m", "messages": [HI], "priority": -3, "include_stop_str_in_output": True, "session_id": "s"}),
    (CHAT, {"model": "m", "messages": [HI], "reasoning_effort": "none", "include_reasoning": False, "documents": []}),
    (CHAT, {"model": "m", "messages": [HI], "return_token_ids": True, "vllm_xargs": {}, "max_tokens": 3}),
    (COMPLETION, {"model": "m", "prompt": "hi", "truncation_side": "right", "truncate_prompt_tokens": 3}),
    (COMPLETION, {"model": "m", "prompt": "hi", "return_tokens_as_token_ids": True, "logprobs": 1, "priority": 9,
                  "logprob_token_ids": [40, 41]}),
    (COMPLETION, {"model": "m", "prompt": "hi", "guided_whitespace_pattern": " ", "add_special_tokens": False}),
    (CHAT, {"model": "t", "messages": [HI], "tools": [{"type": "function", "function": FUNCTION}], "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (RESPONSES, {"model": "t", "input": "hi", "instructions": "s", "max_output_tokens": 9, "stream": True}),
    (RESPONSES, {"model": "t", "input": [
                 HI, {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]}, CALLED,
                 {"type": "function_call_output", "call_id": "c", "output": "x"}],
                 "tools": [{"type": "function", **FUNCTION}], "parallel_tool_calls": False}),
    (RESPONSES, {"model": "m", "input": "hi", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}),
    (RESPONSES, {"model": "m", "input": "hi", "tools": [{"type": "function", **FUNCTION}], "stream": True,
                 "tool_choice": {"type": "function", "name": "f"}}),
    (RESPONSES, {"model": "t", "input": [HI], "reasoning": {"effort": None}, "include": [], "store": False,
                 "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}}),
    (MESSAGES, {"model": "t", "messages": [HI], "max_tokens": 9, "stop_sequences": ["zz"], "stream": True}),
    (MESSAGES, {"model": "t", "max_tokens": 99, "system": [{"type": "text", "text": "s"}], "messages": [
                HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "r", "signature": ""}, USED]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]}],
                "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}]}),
    (MESSAGES, {"model": "m", "messages": [HI], "max_tokens": 9, "tool_choice": {"type": "any"},
                "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}]}),
    (MESSAGES, {"model": "m", "messages": [HI], "max_tokens": 99, "tool_choice": {"type": "tool", "name": "f"},
                "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}]}),
    (MESSAGES, {"model": "t", "messages": [HI], "max_tokens": 99, "thinking": {"type": "adaptive"},
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    (f"{MESSAGES}/count_tokens", {"model": "m", "messages": [HI], "tools": [{"name": "f", "input_schema": {}}]}),
]  # fmt: skip
NUMBERS: list[Any] = [0, -1, 1, 2, 128, 129, 361, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 2**64]
NUMBERS += [10**18, 10**30, -0.0, 0.5, 1e-320, 5e-324, 1.0, 4.0, 1e16, 1e308, -1e308]
TEXTS = [
    *("", " ", "\x00", "\n", "\x1b[31m", "m", "m\x00", "../../etc/passwd", "null", "true", "4", "0x10", "__proto__"),
    *("\ud800", "\udc00\ud800", "\ufeff", "\u202e\u2066x", "e" + "\u0301" * 300, "\ufdfa" * 100, "🏴󠁧󠁢󠁥󠁮󠁧󠁿👩‍👩‍👧‍👦", "Ａ"),
    *(
        "{{7*7}}",
        "{% raw %}",
        "{{ ''.__class__ }}",
        "{%",
        "a" * 5000,
        "hello " * 400,
        *SPECIALS,
        SPECIALS[1] + "system\n",
    ),
    *("wizard", "tool", "system", "developer", "image_url", "text", "auto", "priority", "slow"),
]
LITERALS = [b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"0." + b"1" * 900, b"-", b"01", b"'x'", b'"\\ud800"', b"\xff"]
# Each alone makes a body no JSON that we take, wherever it stands; all but the last four may only be values.
POISONS = [
    *(b"NaN", b"-NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 21, b"0." + b"1" * 600, b"+1", b"0x1"),
    *(b"True", b"None", b"undefined", b"'x'", b'{"a":1,"a":1}', b"[1,]", b'"\n"', b"[" * 70 + b"]" * 70),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"a\\uDBFFb"', b'"\xed\xa0\x80"'),
]
_POISON = "@poison@"
CONTENT_TYPES = [
    *("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/json; charset=utf-16"),
    *(
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        ";",
        "application/json;",
    ),
    *("application/json; charset=\xff", "application/json" + "; a=b" * 200),
]


@dataclass(frozen=True)
class Attack:
    """One POST. `content_type` None leaves the header out; `pieces` > 0 sends the body in that many chunks."""

    path: str
    body: bytes
    content_type: str | None
    pieces: int


def _wrapped(value: Any, depth: int) -> Any:
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


_leaves = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(TEXTS)
    | st.sampled_from([None, True, False, [], {}, [[]], [None], [{}], {"": None}, [1, "a"], ["a", 1]])
    | st.text(max_size=12)
    | st.floats()
    | st.builds(_wrapped, st.sampled_from(["x", 1, None]), st.sampled_from([1, 2, 62, 63, 64, 65, 500]))
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of what is inside `value`, five levels down."""
    if len(path) == 5:
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, v in inner for p in ((*path, key), *_places(v, (*path, key)))]


def _mutate(draw: Callable[[Any], Any], body: Any) -> None:
    """One change of structure, type, number or text, in place."""
    places = _places(body)
    if not places:
        body[draw(st.sampled_from(FIELDS))] = copy.deepcopy(draw(_leaves))
        return
    *way, last = draw(st.sampled_from(places))
    holder = body
    for key in way:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "wrap", "repeat", "swap", "rename"]))
    if how == "replace":
        holder[last] = copy.deepcopy(draw(_leaves))
    elif how == "remove":
        del holder[last]
    elif how == "add":
        target = holder if isinstance(holder, dict) else body
        target[draw(st.sampled_from(FIELDS) | st.sampled_from(TEXTS))] = copy.deepcopy(draw(_leaves))
    elif how == "wrap":
        holder[last] = draw(st.sampled_from([[holder[last]], {"text": holder[last]}, str(holder[last])]))
    elif how == "repeat":
        holder[last] = [copy.deepcopy(holder[last]) for _ in range(draw(st.sampled_from([2, 5, 17, 129, 2049])))]
    elif how == "swap":
        body[draw(st.sampled_from(FIELDS))] = copy.deepcopy(holder[last])
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from(TEXTS))] = holder.pop(last)


def _poison(draw: Callable[[Any], Any], body: Any) -> bytes:
    """Marks one place of `body`; what is to stand there."""
    places = _places(body)
    where = draw(st.sampled_from(["place", "place", "field", "inside", "key"])) if places else "field"
    if where == "key":
        body[_POISON] = 1
        return draw(st.sampled_from(POISONS[-4:]))
    if where == "field":
        body[draw(st.sampled_from(FIELDS))] = _POISON
    elif where == "inside":
        body[draw(st.sampled_from(["metadata", "logit_bias", "stop"]))] = draw(
            st.sampled_from([{"40": _POISON}, [_POISON], _POISON])
        )
    else:
        *way, last = draw(st.sampled_from(places))
        holder = body
        for key in way:
            holder = holder[key]
        holder[last] = _POISON
    return draw(st.sampled_from(POISONS))


def poisoned() -> list[Attack]:
    """Every poison in a chat where nothing else is wrong: in fields whose value is looked at, and in others."""
    found = []
    for poison in POISONS:
        for field in (b'"metadata":{"a":%b}', b'"temperature":%b', b'"stop":[%b]', b'"no_such_field":%b'):
            body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":4,' + field % poison + b"}"
            found.append(Attack(CHAT, body, "application/json", 0))
    return found


def _mangle(draw: Callable[[Any], Any], raw: bytes) -> bytes:
    """One change of the bytes."""
    at = draw(st.integers(0, len(raw)))
    how = draw(
        st.sampled_from(
            ["cut", "cut", "insert", "delete", "flip", "literal", "twice", "join", "encode", "deep", "junk"]
        )
    )
    if how == "cut":
        return raw[:at]
    if how == "insert":
        return raw[:at] + draw(st.binary(min_size=1, max_size=6)) + raw[at:]
    if how == "delete":
        return raw[:at] + raw[at + draw(st.integers(1, 9)) :]
    if how == "flip":
        return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :] if at < len(raw) else raw
    if how == "literal":
        at = raw.find(b":", at) + 1
        return raw[:at] + draw(st.sampled_from(LITERALS)) + raw[at:].lstrip(b' "abcdefghijklmnopqrstuvwxyz0123456789')
    if how == "twice":
        return b'{"model":"m","messages":[],"prompt":"x",' + raw[1:]
    if how == "join":
        return raw + draw(st.sampled_from([raw, b",", b"]", b"}", b" //x", b"\x00", b" " * 70_000, b"{}"]))
    if how == "encode":
        text = raw.decode("utf-8", "replace")
        return draw(st.sampled_from([b"\xef\xbb\xbf" + raw, text.encode("utf-16"), text.encode("utf-32-le")]))
    if how == "deep":
        opened = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([60, 66, 1000, 12_000]))
        at = raw.find(b":", at) + 1  # where a value may begin
        return raw[:at] + opened + raw[at:]
    return draw(st.binary(max_size=400))


@st.composite
def attacks(draw: Callable[[Any], Any], goods: Sequence[tuple[str, dict[str, Any]]] = GOOD) -> Attack:
    """A request that is probably bad, made of one of `goods`."""
    path, good = draw(st.sampled_from(goods))
    body = copy.deepcopy(good)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 4]))):
        _mutate(draw, body)
    poison = _poison(draw, body) if draw(st.integers(0, 4)) == 0 else None
    ascii_only = draw(st.booleans())
    raw = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if poison is not None:
        raw = raw.replace(f'"{_POISON}"'.encode(), poison)
    for _ in range(0 if poison is not None else draw(st.sampled_from([0, 0, 0, 1, 2]))):
        raw = _mangle(draw, raw)
    if draw(st.integers(0, 9)) == 0:
        path = draw(st.sampled_from(sorted({p for p, _ in goods})))
    usual = draw(st.integers(0, 9)) > 0
    kind = "application/json" if usual else draw(st.none() | st.sampled_from(CONTENT_TYPES))
    return Attack(path, raw, kind, draw(st.sampled_from([0, 0, 1, 3, 50])))
