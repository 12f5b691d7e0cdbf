"""Strict JSON for request bodies: what RFC 8259 allows and every reader understands alike, within caps.

Refused beyond the syntax: NaN and infinities (also by overflow), more than 64 levels, integers of more than 20 digits,
more than 500,000 values, duplicate keys, lone surrogates, anything but UTF-8 without a byte order mark, and a top level
that is not an object. The work is linear in the body's length, whatever it holds.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any

from router.protocol.errors import HttpRefusal, echo
from workers.api.errors import InvalidRequest

MAX_BODY_BYTES = 8 << 20
MAX_DEPTH = 64
MAX_INTEGER_DIGITS = 20  # 2**64 has 20: ranges are judged later, by name
MAX_NUMBER_CHARACTERS = 512
MAX_VALUES = 500_000  # more than a prompt of token ids has
MAX_KEY_CHARACTERS = 1024

# Possessive, and content with a string that never ends: no body makes it go back over what it has read.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LONG_INTEGER = re.compile(rb"(?<![.0-9])[0-9]{%d}" % (MAX_INTEGER_DIGITS + 1))
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_STEP = [1 if b in b"[{" else -1 for b in range(256)]
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyNotJson(InvalidRequest):
    """The body is not a JSON object that we take."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"We could not parse the JSON body of your request: {reason}.")


def parse_object(body: bytes, *, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The object that `body` holds. Raises BodyNotJson, or HttpRefusal (413) over `max_bytes`."""
    if len(body) > max_bytes:
        raise too_large(max_bytes)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BodyNotJson(f"it is not UTF-8 at byte {e.start}") from None
    if text.startswith("\ufeff"):
        raise BodyNotJson("it starts with a byte order mark")
    check_shape(body)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise BodyNotJson(f"{e.msg} at line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise BodyNotJson(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise BodyNotJson("it must be an object")
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def too_large(max_bytes: int) -> HttpRefusal:
    """The refusal of a body over the cap."""
    return HttpRefusal(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")


def check_shape(body: bytes) -> None:
    """Raises BodyNotJson by depth, number of values and digits, seen without the strings; linear in the length."""
    if body.count(b'"') > 4 * MAX_VALUES:  # a key and a string for each value; also keeps the next line short
        raise BodyNotJson(f"it has more than {MAX_VALUES} values")
    bare = _STRING.sub(b"", body)
    if bare.count(b",") >= MAX_VALUES:
        raise BodyNotJson(f"it has more than {MAX_VALUES} values")
    if _LONG_INTEGER.search(bare):
        raise BodyNotJson(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    opened = bare.count(b"[") + bare.count(b"{")
    if opened <= MAX_DEPTH:
        return
    if opened > MAX_VALUES:
        raise BodyNotJson(f"it has more than {MAX_VALUES} values")
    if max(accumulate(map(_STEP.__getitem__, bare.translate(None, _NOT_BRACKETS)))) > MAX_DEPTH:
        raise BodyNotJson(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BodyNotJson("a string holds half of a surrogate pair") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise BodyNotJson(f"the key '{echo(twice)}' is there twice")
    for key in made:
        if len(key) > MAX_KEY_CHARACTERS:
            raise InvalidRequest(f"Unknown parameter: '{echo(key)}'.", param=echo(key), code="unknown_parameter")
    return made


def _number(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER_CHARACTERS else math.inf
    if math.isinf(value):
        raise BodyNotJson(f"the number {echo(text)} is too large")
    return value


def _constant(name: str) -> Any:
    raise BodyNotJson(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant, strict=True)
