"""Tools as OpenAI's chats name them: in requests, in messages, and as the grammar of an answer that must call one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StringConstraints

from router.protocol.json_entry import BodyNotJson, check_shape
from router.protocol.strict import Strict
from router.protocol.structured import AskedGrammar, Path
from router.protocol.validation import Refused, mistyped
from workers.api.grammar import MOST_SOURCE, GrammarKind, GrammarSpec

MAX_TOOLS = 128
_DEFINITIONS = "$defs"
_PLACE = "tool"

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """A function that the model may call. `strict` changes nothing: a call that is required obeys the schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by name."""

    name: FunctionName


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Strict):
    """A function that was called; `arguments` are JSON, as the model wrote them."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # in messages put together from a stream

    def as_template(self, at: Path) -> dict[str, Any]:
        """As chat templates take it: the arguments are an object. Raises Refused where they are none."""
        arguments = arguments_of(self.function.arguments, (*at, "function", "arguments"))
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


def arguments_of(text: str, at: Path) -> dict[str, Any]:
    """A call's arguments; none at all are an empty object. Raises Refused where they are no JSON object, or a strange
    one: too deep for whoever walks over it, or with strings that are no text.
    """
    try:
        check_shape(text.encode())
        arguments = json.loads(text) if text.strip() else {}
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError, BodyNotJson):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused("Invalid '{param}': expected a JSON object as text.", at=at)
    return arguments


def offered(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None = None) -> Tool:
    """A function whose fields were checked, as chats have it."""
    function = Function.model_construct(name=name, description=description, parameters=parameters, strict=strict)
    return Tool.model_construct(type="function", function=function)


def named(name: str) -> NamedTool:
    """The choice of the function of that name."""
    return NamedTool.model_construct(type="function", function=NamedFunction.model_construct(name=name))


def choice_of(value: Any, read: Callable[[dict[str, Any]], NamedTool]) -> str | NamedTool | None:
    """A chat's choice, from a request's; `read` makes it of an object. Raises Refused."""
    if value is None or value in ("none", "auto", "required"):
        chosen: str | None = value
        return chosen
    if isinstance(value, dict):
        return read(value)
    if isinstance(value, str):
        raise Refused("Invalid value: '{param}'. Supported values are: 'none', 'auto', 'required', and an object.")
    raise mistyped("a string or an object", value)


ToolChoice = Annotated[
    str | NamedTool | None,
    PlainValidator(
        lambda v: choice_of(v, NamedTool.model_validate),
        json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None,
    ),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def check_choice(tools: Sequence[Tool], choice: str | NamedTool | None) -> None:
    """Raises Refused where there is nothing to choose."""
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise Refused(
                "Invalid '{param}': there are two functions of that name.", at=("tools", i, "function", "name")
            )
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise Refused("'{param}' is only allowed when 'tools' are specified.", at=("tool_choice",))
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise Refused("Invalid '{param}': no tool has that name.", at=("tool_choice", "function", "name"))


def required_grammar(tools: Sequence[Tool], choice: str | NamedTool | None, *, parallel: bool) -> AskedGrammar | None:
    """The grammar of an answer that has to call: the arguments of the named function, or a list of calls."""
    if isinstance(choice, NamedTool):
        (at, tool), *_ = [(i, t) for i, t in enumerate(tools) if t.function.name == choice.function.name]
        place: Path = ("tools", at, "function", "parameters")
        return AskedGrammar(_spec(_arguments(tool), place), place)
    if choice != "required":
        return None
    calls = []
    definitions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        name = f"{_PLACE}{i}"
        definitions[name] = _moved(_arguments(tool), f"#/{_DEFINITIONS}/{name}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": {"$ref": f"#/{_DEFINITIONS}/{name}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    # The definitions first: what is at fault is looked for in this order.
    schema: dict[str, Any] = {_DEFINITIONS: definitions, "type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return _RequiredCall(_spec(schema, ("tools",)), ("tools",))


@dataclass(frozen=True, slots=True)
class _RequiredCall(AskedGrammar):
    """A list of calls."""

    def place(self, inside: Path) -> Path:
        """In the parameters of the function at fault."""
        if len(inside) < 2 or inside[0] != _DEFINITIONS:
            return self.at
        return ("tools", int(str(inside[1]).removeprefix(_PLACE)), "function", "parameters", *inside[2:])


def _spec(schema: dict[str, Any], at: Path) -> GrammarSpec:
    source = json.dumps(schema)
    if len(source) > MOST_SOURCE:
        raise Refused(f"Invalid '{{param}}': {len(source)} characters are over {MOST_SOURCE}.", at=at)
    return GrammarSpec(GrammarKind.JSON_SCHEMA, source)


def _arguments(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **(tool.function.parameters or {"properties": {}, "additionalProperties": False})}


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its references to itself, now that its root is at `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items() if key not in ("const", "enum", "default")}
    moved |= {key: schema[key] for key in ("const", "enum", "default") if key in schema}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return {key: moved[key] for key in schema}
