"""What an answer must look like, as requests say it: OpenAI's `response_format`, vLLM's `structured_outputs`.

A schema is enforced whether `strict` is set or not. The older names of vLLM's (`guided_json`, ...) are taken, too.
Beyond vLLM: `wrap_up`, how many tokens before `max_tokens` an answer in JSON begins to close what is open (`None`: a
quarter of them, at most 256; 0: never, so that it may be cut).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from router.protocol.strict import Harmless, Strict, is_false, is_nothing
from router.protocol.validation import Refused
from workers.api.grammar import MOST_SOURCE, SPACES, GrammarKind, GrammarSpec

MOST_WRAP_UP = 256
MAX_CHOICES = 4096
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = '{"type": "object"}'

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Path = tuple[str | int, ...]
JsonValue = dict[str, Any] | str | None
Source = Annotated[str, Field(min_length=1, max_length=MOST_SOURCE)] | None
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None
SpacePattern = Annotated[str, Field(max_length=256)] | None


class JsonSchema(Strict):
    """A named schema. `strict` and `description` change nothing: the schema is enforced, and nobody reads the text."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(validation_alias="schema", serialization_alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            at = ("json_schema",) if self.json_schema is None else ("json_schema", "schema")
            raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=at)
        if self.type != "json_schema" and self.json_schema is not None:
            raise Refused("'{param}' is only allowed where type is 'json_schema'.", at=("json_schema",))
        return self


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: one of `json`, `regex`, `choice`, `grammar`, `json_object`, or options alone."""

    not_done: ClassVar[dict[str, Harmless]] = {
        "structural_tag": is_nothing,
        "disable_fallback": lambda v: v is None or isinstance(v, bool),  # there is one backend
        "disable_additional_properties": is_false,
    }

    json_: Annotated[JsonValue, Field(validation_alias="json", serialization_alias="json")] = None
    regex: Source = None
    choice: Choices = None
    grammar: Source = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: SpacePattern = None
    wrap_up: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None

    @property
    def asked(self) -> list[str]:
        """Which of the kinds are there."""
        values = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        return [kind for kind, value in zip(_KINDS, values, strict=True) if value is not None]

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.asked) > 1:
            raise Refused(f"Invalid '{{param}}': {' and '.join(self.asked)} exclude each other.")
        return self


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar that a request asks for, and where in its body it stands. `wrap_up`: as asked for, if it was."""

    spec: GrammarSpec
    at: Path
    wrap_up: int | None = None

    def place(self, inside: Path) -> Path:
        """Where a part of the grammar's schema stands in the body."""
        return (*self.at, *inside)

    def within(self, max_tokens: int, begins_after: str = "") -> GrammarSpec:
        """The grammar of an answer that has at most so many tokens, and begins behind that text."""
        wrap_up = self.wrap_up
        if wrap_up is None:
            wrap_up = default_wrap_up(max_tokens) if self.spec.kind is GrammarKind.JSON_SCHEMA else 0
        return replace(self.spec, wrap_up=wrap_up, begins_after=begins_after)


class GuidedFields(Strict):
    """What `structured_outputs` says, as bodies said it before there was that field."""

    guided_json: JsonValue = None
    guided_regex: Source = None
    guided_choice: Choices = None
    guided_grammar: Source = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: SpacePattern = None

    @property
    def as_outputs(self) -> StructuredOutputs | None:
        """The same by its newer name; None where nothing is said. Raises Refused for two grammars."""
        outputs = StructuredOutputs.model_construct(
            json_=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            json_object=self.guided_json_object,
            whitespace_pattern=self.guided_whitespace_pattern,
        )
        if len(outputs.asked) > 1:
            both = " and ".join(f"'guided_{kind}'" for kind in outputs.asked)
            raise Refused(f"{both} exclude each other.", at=(f"guided_{outputs.asked[0]}",))
        return outputs if outputs.asked or outputs.whitespace_pattern is not None else None


def asked_grammar(
    form: ResponseFormat | None, outputs: StructuredOutputs | None, guided: GuidedFields | None = None
) -> AskedGrammar | None:
    """What the fields ask for together; None if nothing. Raises Refused where two name a grammar."""
    older = None if guided is None else guided.as_outputs
    if older is not None:
        if outputs is not None:
            raise Refused("'{param}' and the 'guided_' fields exclude each other.", at=("structured_outputs",))
        asked = asked_grammar(form, older)
        if asked is None or asked.at[0] != "structured_outputs":
            return asked
        return replace(asked, at=(f"guided_{asked.at[1]}", *asked.at[2:]))
    found = None if outputs is None else _of_outputs(outputs)
    if form is not None and form.type != "text":
        if found is not None:
            raise Refused("'{param}' and 'response_format' exclude each other.", at=("structured_outputs",))
        if form.json_schema is None:
            found = GrammarKind.JSON_SCHEMA, _ANY_OBJECT, ("response_format",)
        else:
            source = json.dumps(form.json_schema.schema_)
            found = GrammarKind.JSON_SCHEMA, source, ("response_format", "json_schema", "schema")
    if found is None:
        return None
    kind, source, at = found
    if len(source) > MOST_SOURCE:
        raise Refused(
            f"Invalid '{{param}}': {len(source)} characters are over {MOST_SOURCE}.",
            code="string_above_max_length",
            at=at,
        )
    spaces, wrap_up = SPACES, None
    if outputs is not None:
        spaces = "" if outputs.disable_any_whitespace else outputs.whitespace_pattern or SPACES
        wrap_up = outputs.wrap_up
    return AskedGrammar(GrammarSpec(kind, source, spaces), at, wrap_up)


def _of_outputs(outputs: StructuredOutputs) -> tuple[GrammarKind, str, Path] | None:
    field = next(iter(outputs.asked), None)
    at: Path = ("structured_outputs", field or "")
    if field == "regex":
        return GrammarKind.REGEX, outputs.regex or "", at
    if field == "grammar":
        return GrammarKind.LARK, outputs.grammar or "", at
    if field == "choice":
        return GrammarKind.LARK, "start: " + " | ".join(map(json.dumps, outputs.choice or ())), at
    if field == "json_object":
        return GrammarKind.JSON_SCHEMA, _ANY_OBJECT, at
    if field == "json":
        schema = outputs.json_
        return GrammarKind.JSON_SCHEMA, schema if isinstance(schema, str) else json.dumps(schema), at
    return None


def default_wrap_up(max_tokens: int) -> int:
    """Tokens kept for closing an answer in JSON of at most `max_tokens`."""
    return min(MOST_WRAP_UP, max_tokens // 4)
