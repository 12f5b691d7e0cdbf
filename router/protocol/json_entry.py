"""Strict JSON for request bodies: what RFC 8259 allows and every reader understands alike, within caps.

Refused beyond the syntax: NaN and infinities (also by overflow), more than 64 levels, integers of more than 20 digits,
duplicate keys, lone surrogates, anything but UTF-8 without a byte order mark, and a top level that is not an object.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from router.protocol.errors import HttpRefusal, echo
from workers.api.errors import InvalidRequest

MAX_BODY_BYTES = 8 << 20
MAX_DEPTH = 64
MAX_INTEGER_DIGITS = 20  # 2**64 has 20: ranges are judged later, by name
MAX_NUMBER_CHARACTERS = 512
MAX_KEY_CHARACTERS = 1024

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
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
    _check_depth(body)
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


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    # Each round takes away the innermost pairs, in C; what is left after 64 rounds is deeper than that.
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    if len(brackets) > MAX_DEPTH:
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


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS + digits.startswith("-"):
        raise BodyNotJson(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER_CHARACTERS else math.inf
    if math.isinf(value):
        raise BodyNotJson(f"the number {echo(text)} is too large")
    return value


def _constant(name: str) -> Any:
    raise BodyNotJson(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant, strict=True
)
