"""Field types of request bodies that are more than one JSON type, each with its check and its schema."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator

from router.protocol.errors import echo
from router.protocol.validation import Refused, mistyped, type_name
from router.text.templates import SET_BY_SERVER

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 512
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 64
MAX_TEMPLATE_VARIABLES = 64
MAX_DOCUMENTS = 256
MAX_TEMPLATE_CHARACTERS = 1 << 16
MAX_BIAS_ENTRIES = 1024
MAX_LOGPROB_IDS = 128
MAX_PROMPTS = 1024
MAX_PARTS = 1024
_ID = re.compile(r"0|[1-9][0-9]{0,11}")


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _too_many(got: int, limit: int) -> Refused:
    return Refused(
        f"Invalid '{{param}}': array too long. Expected an array with maximum length {limit}, "
        f"but got an array with length {got} instead.",
        code="array_above_max_length",
    )


def _empty(at: tuple[str | int, ...] = ()) -> Refused:
    return Refused(
        "Invalid '{param}': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        code="empty_array",
        at=at,
    )


def text_of_parts(value: Any, types: tuple[str, ...] = ("text",), ignored: tuple[str, ...] = ()) -> str:
    """A message's text; parts are joined by a newline, so that no word (or special string) grows out of two.

    `types` are those of parts of text, `ignored` their fields that ask for nothing.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise mistyped("a string or an array of content parts", value)
    if not value:
        raise _empty()
    if len(value) > MAX_PARTS:
        raise _too_many(len(value), MAX_PARTS)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise mistyped("an object", part, (i,))
        for name in ("type", "text"):
            if name not in part:
                if name == "text" and part["type"] not in types:
                    break
                raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=(i, name))
        if part["type"] not in types:
            supported = ", ".join(f"'{name}'" for name in types)
            raise Refused(
                f"Invalid value: '{echo(part['type'])}'. Supported values are: {supported}.",
                at=(i, "type"),
            )
        if not isinstance(part["text"], str):
            raise mistyped("a string", part["text"], (i, "text"))
        for name in part:
            if name not in ("type", "text", *ignored):
                raise Refused("Unknown parameter: '{param}'.", code="unknown_parameter", at=(i, echo(name)))
        texts.append(part["text"])
    return "\n".join(texts)


def _content(value: Any) -> str:
    return text_of_parts(value)


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    elif not isinstance(value, list):
        raise mistyped("a string or an array of strings", value)
    if len(value) > MAX_STOPS:
        raise _too_many(len(value), MAX_STOPS)
    for i, text in enumerate(value):
        at = (i,) if len(value) > 1 else ()
        if not isinstance(text, str):
            raise mistyped("a string", text, at)
        if not text:
            raise Refused("Invalid '{param}': a stop string must not be empty.", at=at)
        if len(text) > MAX_STOP_CHARACTERS:
            raise Refused(
                f"Invalid '{{param}}': string too long. Expected a string with maximum length {MAX_STOP_CHARACTERS}, "
                f"but got a string with length {len(text)} instead.",
                code="string_above_max_length",
                at=at,
            )
    return tuple(value)


def _bad_words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise mistyped("an array of strings", value)
    if len(value) > MAX_BAD_WORDS:
        raise _too_many(len(value), MAX_BAD_WORDS)
    for i, word in enumerate(value):
        if not isinstance(word, str):
            raise mistyped("a string", word, (i,))
        if not word:
            raise Refused("Invalid '{param}': a bad word must not be empty.", at=(i,))
        if len(word) > MAX_BAD_WORD_CHARACTERS:
            raise Refused(
                f"Invalid '{{param}}': string too long. Expected a string with maximum length "
                f"{MAX_BAD_WORD_CHARACTERS}, but got a string with length {len(word)} instead.",
                code="string_above_max_length",
                at=(i,),
            )
    return tuple(dict.fromkeys(value))


def _template_variables(value: Any) -> dict[str, Any]:
    """Names that a template may read, and their values: plain JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise mistyped("an object", value)
    if len(value) > MAX_TEMPLATE_VARIABLES:
        raise Refused(
            f"Invalid '{{param}}': too many properties. Expected an object with at most {MAX_TEMPLATE_VARIABLES}."
        )
    for name in value:
        if not (name.isidentifier() and len(name) <= 64):
            raise Refused(f"Invalid '{{param}}': '{echo(name)}' is no name of a variable.")
        if name in SET_BY_SERVER:
            raise Refused(f"Invalid '{{param}}': '{name}' is set by the server.")
    return value


def _ids(value: list[Any], at: tuple[str | int, ...] = ()) -> tuple[int, ...]:
    for i, token in enumerate(value):
        if type(token) is not int:
            raise mistyped("an integer", token, (*at, i))
        if token < 0:
            raise Refused(
                f"Invalid '{{param}}': integer below minimum value. Expected a value >= 0, but got {token} instead.",
                code="integer_below_min_value",
                at=(*at, i),
            )
    return tuple(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise mistyped("an array of integers", value)
    return _ids(value)


def _allowed_ids(value: Any) -> tuple[int, ...]:
    if value == []:
        raise _empty()
    return _token_ids(value)


def _logprob_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > MAX_LOGPROB_IDS:
        raise _too_many(len(value), MAX_LOGPROB_IDS)
    return tuple(dict.fromkeys(_allowed_ids(value)))


def _texts(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise mistyped("a string or an array of strings", value)
    if len(value) > MAX_PROMPTS:
        raise _too_many(len(value), MAX_PROMPTS)
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise mistyped("a string", text, (i,))
    return tuple(value)


def _prompt(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """All prompts of a completion: a string, strings, ids, or lists of ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise mistyped("a string or an array", value)
    if not value:
        raise _empty()
    if isinstance(value[0], (int, float)) or value[0] is None:
        return (_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise _too_many(len(value), MAX_PROMPTS)
    prompts: list[str | tuple[int, ...]] = []
    wants_text = isinstance(value[0], str)
    for i, one in enumerate(value):
        if wants_text != isinstance(one, str) or not isinstance(one, (str, list)):
            raise mistyped("a string" if wants_text else "an array of integers", one, (i,))
        if not one and not wants_text:
            raise _empty((i,))
        prompts.append(one if isinstance(one, str) else _ids(one, (i,)))
    return tuple(prompts)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise mistyped("an object", value)
    if len(value) > MAX_BIAS_ENTRIES:
        raise Refused(
            f"Invalid '{{param}}': expected at most {MAX_BIAS_ENTRIES} entries, but got {len(value)} instead."
        )
    biases = []
    for key, bias in value.items():
        if not _ID.fullmatch(key):
            raise Refused(f"Invalid '{{param}}': '{echo(key)}' is not a token id.")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise Refused(
                f"Invalid type for '{{param}}.{key}': expected a number, but got {type_name(bias)} instead.",
                code="invalid_type",
            )
        if not -100 <= bias <= 100:
            raise Refused(f"Invalid '{{param}}': expected values in [-100, 100], but got {echo(bias)} instead.")
        biases.append((int(key), float(bias)))
    return tuple(biases)


BadWords = Annotated[tuple[str, ...], PlainValidator(_bad_words, json_schema_input_type=list[str] | None)]
TemplateVariables = Annotated[
    dict[str, Any], PlainValidator(_template_variables, json_schema_input_type=dict[str, Any] | None)
]
Content = Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart])]
Stop = Annotated[tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
TokenIds = Annotated[tuple[int, ...], PlainValidator(_token_ids, json_schema_input_type=list[int] | None)]
AllowedIds = Annotated[tuple[int, ...], PlainValidator(_allowed_ids, json_schema_input_type=list[int] | None)]
LogprobIds = Annotated[tuple[int, ...], PlainValidator(_logprob_ids, json_schema_input_type=list[int] | None)]
Texts = Annotated[str | tuple[str, ...], PlainValidator(_texts, json_schema_input_type=str | list[str])]
Prompt = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
]
Template = Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE_CHARACTERS)] | None  # jinja
Documents = Annotated[list[dict[str, str]], Field(max_length=MAX_DOCUMENTS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
