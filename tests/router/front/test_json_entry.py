"""The JSON entry: what is refused, and that nothing hostile is more than refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.protocol.errors import HttpRefusal, answer_for
from router.protocol.interactive import InteractiveBody, InteractiveQosBody
from router.protocol.json_entry import BodyNotJson, parse_object
from router.protocol.messages import CountBody, MessagesBody
from router.protocol.openai import ChatBody, CompletionBody
from router.protocol.qos_bodies import QosChatBody, QosCompletionBody
from router.protocol.responses import ResponsesBody
from router.protocol.validation import validate
from workers.api.errors import RequestError

REFUSED = {
    "open": b"{",
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"1",
    "trailing comma": b'{"a":1,}',
    "comment": b'{"a":1} // x',
    "single quotes": b"{'a':1}",
    "bare key": b"{a:1}",
    "deep": b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}",
    "deeper than the stack": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and open": b"[" * 1_000_000,
    "never ending strings": b"[{" * 40 + b'"\\' * 1_000_000,
    "many values": b'{"a":[' + b"1," * 600_000 + b"1]}",
    "many arrays": b'{"a":[' + b"[]" * 600_000 + b"]}",
    "deep objects": b'{"a":' * 100 + b"1" + b"}" * 100,
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":-Infinity}',
    "overflow": b'{"a":1e999}',
    "long fraction": b'{"a":0.' + b"1" * 1000 + b"}",
    "digits": b'{"a":' + b"1" * 5000 + b"}",
    "10**30": b'{"a":1000000000000000000000000000000}',
    "lone surrogate": b'{"a":"\\ud800"}',
    "reversed surrogates": b'{"a":"\\udc00\\ud800"}',
    "surrogate key": b'{"\\uDBFF":1}',
    "0xFF": b'{"a":"\xff"}',
    "overlong": b'{"a":"\xc0\xaf"}',
    "encoded surrogate": b'{"a":"\xed\xa0\x80"}',
    "truncated": b'{"a":"\xe4\xbd"}',
    "BOM": b'\xef\xbb\xbf{"a":1}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-32": '{"a":1}'.encode("utf-32"),
    "duplicate": b'{"a":1,"a":2}',
    "nested duplicate": b'{"b":{"a":1,"a":2}}',
    "two documents": b'{"a":1}{"a":1}',
    "raw control character": b'{"a":"\n"}',
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_refused(body):
    with pytest.raises(BodyNotJson) as e:
        parse_object(body)
    assert e.value.message.startswith("We could not parse the JSON body of your request")
    assert (e.value.param, e.value.code) == (None, None)
    assert len(e.value.message) < 200


def test_taken():
    body = '{"a":[1,-0.0,5e-324,18446744073709551616,true,null],"s":"\\u0000\\ud83c\\udf89é[{","b":{"c":{}}}'
    assert parse_object(body.encode()) == json.loads(body)
    flat = b'{"a":[' + b",".join([b"[]"] * 1000) + b"]}"
    assert len(parse_object(flat)["a"]) == 1000
    brackets_in_text = json.dumps({"a": "[" * 500 + '"' + "{" * 500 + "\\"}).encode()
    assert parse_object(brackets_in_text)["a"].startswith("[[")
    assert parse_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")


def test_too_large():
    with pytest.raises(HttpRefusal) as e:
        parse_object(b" " * 11, max_bytes=10)
    assert answer_for(e.value).status == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BODIES = (
    *(ChatBody, CompletionBody, QosChatBody, QosCompletionBody, InteractiveBody, InteractiveQosBody),
    *(ResponsesBody, MessagesBody, CountBody),
)
FIELDS = sorted({name for body in BODIES for name in (*body.model_fields, *body.not_done)})


def hostile_body():
    fields = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=6)
    hi = [{"role": "user", "content": "hi"}]
    base = st.sampled_from(
        [
            *({}, {"model": "m", "messages": hi}, {"model": "m", "prompt": "x"}),
            *({"model": "m", "input": "x"}, {"model": "m", "messages": hi, "max_tokens": 9}),
        ]
    )
    return st.builds(lambda b, f: {**b, **f}, base, fields)


@given(hostile_body(), st.sampled_from(BODIES))
@settings(max_examples=300, deadline=None)
def test_hostile_fields_are_refused_by_name(body, model):
    """Whatever stands in the fields: a checked body, or a 4xx whose message is short and whose body is JSON."""
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    try:
        assert isinstance(validate(model, parse_object(raw)), model)
    except RequestError as e:
        answer = answer_for(e)
        assert 400 <= answer.status < 500
        assert len(answer.message) < 600
        assert json.loads(answer.body)["error"]["message"]


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes(raw):
    try:
        assert isinstance(parse_object(raw), dict)
    except RequestError as e:
        assert answer_for(e).status == 400  # noqa: PT017
