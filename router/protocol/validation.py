"""pydantic's findings in OpenAI's words: message, `param` and `code`, the first finding only."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from router.protocol.errors import echo
from workers.api.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "bool": "a boolean",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
    "dataclass": "an object",
}
_LIMITS = {
    "greater_than_equal": ("below_min_value", "below minimum value", ">=", "ge"),
    "greater_than": ("below_min_value", "below minimum value", ">", "gt"),
    "less_than_equal": ("above_max_value", "above maximum value", "<=", "le"),
    "less_than": ("above_max_value", "above maximum value", "<", "lt"),
}


class Refused(ValueError):
    """Raised inside a validator with the message, code and (below the field) the path to show."""

    def __init__(self, message: str, *, code: str | None = "invalid_value", at: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.at = at


def validate(model: type[M], value: dict[str, Any]) -> M:
    """`value` as `model`. Raises InvalidRequest for the first thing wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as e:
        raise _translate(e.errors(include_url=False)[0]) from None


def path(parts: tuple[str | int, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{echo(part)}" if text else echo(part)
    return text


def wrong_type(name: str, wanted: str, value: object) -> str:
    """OpenAI's sentence for a value of the wrong type."""
    return f"Invalid type for '{name}': expected {wanted}, but got {type_name(value)} instead."


def mistyped(wanted: str, value: object, at: tuple[str | int, ...] = ()) -> Refused:
    """Of a value of another JSON type than `wanted`."""
    return Refused(
        f"Invalid type for '{{param}}': expected {wanted}, but got {type_name(value)} instead.",
        code="invalid_type",
        at=at,
    )


def type_name(value: object) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a decimal"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, (list, tuple)) else "an object"


def _translate(error: Any) -> InvalidRequest:
    kind: str = error["type"]
    context: dict[str, Any] = error.get("ctx", {})
    value = error.get("input")
    cause = context.get("error")
    if isinstance(cause, Refused):
        name = path(error["loc"] + cause.at)
        return InvalidRequest(str(cause).replace("{param}", name), param=name or None, code=cause.code)
    name = path(error["loc"])
    param = name or None
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{name}'.", param=param, code="unknown_parameter")
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=param, code="missing_required_parameter")
    if kind.endswith("_type") and kind.removesuffix("_type") in _WANTED:
        wanted = _WANTED[kind.removesuffix("_type")]
        return InvalidRequest(wrong_type(name, wanted, value), param=param, code="invalid_type")
    if kind in _LIMITS:
        code, words, sign, key = _LIMITS[kind]
        number = "integer" if isinstance(value, int) and isinstance(context[key], int) else "decimal"
        return InvalidRequest(
            f"Invalid '{name}': {number} {words}. Expected a value {sign} {_plain(context[key])}, "
            f"but got {_plain(value)} instead.",
            param=param,
            code=f"{number}_{code}",
        )
    if kind == "literal_error":
        return InvalidRequest(
            f"Invalid value: '{echo(value)}'. Supported values are: {context['expected'].replace(' or ', ', ')}.",
            param=param,
            code="invalid_value",
        )
    if kind in ("too_long", "too_short"):
        return _wrong_length(kind, name, context)
    if kind in ("string_too_long", "string_too_short"):
        short = kind == "string_too_short"
        limit = f"minimum length {context['min_length']}" if short else f"maximum length {context['max_length']}"
        return InvalidRequest(
            f"Invalid '{name}': string too {'short' if short else 'long'}. Expected a string with {limit}, "
            f"but got a string with length {len(value or '')} instead.",
            param=param,
            code="string_below_min_length" if short else "string_above_max_length",
        )
    if kind == "string_pattern_mismatch":
        return InvalidRequest(
            f"Invalid '{name}': string does not match pattern. Expected a string that matches the pattern "
            f"'{context['pattern']}'.",
            param=param,
            code="invalid_value",
        )
    return InvalidRequest(f"Invalid '{name}': {error['msg']}.", param=param, code="invalid_value")


def _wrong_length(kind: str, name: str, context: dict[str, Any]) -> InvalidRequest:
    got, noun = context["actual_length"], context["field_type"].lower()
    noun = {"list": "array", "dictionary": "object"}.get(noun, noun)
    if kind == "too_short":
        code = f"empty_{noun}" if got == 0 else f"{noun}_below_min_length"
        words, limit = ("empty" if got == 0 else "too short"), f"minimum length {context['min_length']}"
    else:
        code, words = f"{noun}_above_max_length", "too long"
        limit = f"maximum length {context['max_length']}"
    got = f"an empty {noun}" if got == 0 else f"an {noun} with length {got}" if got is not None else f"a longer {noun}"
    return InvalidRequest(
        f"Invalid '{name}': {words} {noun}. Expected an {noun} with {limit}, but got {got} instead.",
        param=name,
        code=code,
    )


def _plain(value: object) -> str:
    return echo(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value)
