"""Bodies of /v1/responses as OpenAI's clients send them, over the chat that there is.

Text, functions and thoughts, and nothing is stored: `store` true and what would need it (`previous_response_id`,
`conversation`, `background`) are refused by name, as are tools that a server would have to run, and all that `include`
could add.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, model_validator

from router.protocol.errors import echo
from router.protocol.fields import TextPart, text_of_parts
from router.protocol.openai import (
    MAX_MESSAGES,
    MAX_TOKENS,
    ChatBody,
    ChatMessage,
    Effort,
    Label,
    Metadata,
    ServiceTier,
)
from router.protocol.strict import Harmless, Strict, is_false, is_nothing
from router.protocol.structured import JsonSchema, Name, Path, ResponseFormat
from router.protocol.tools import (
    MAX_TOOLS,
    FunctionName,
    NamedTool,
    Tool,
    arguments_of,
    choice_of,
    named,
    offered,
)
from router.protocol.turns import Turns
from router.protocol.validation import Refused, mistyped

_TYPES = ("input_text", "output_text", "text")


def _texts(types: tuple[str, ...]) -> PlainValidator:
    ignored = ("annotations", "logprobs", "parsed")  # the last is what the client itself made of the text
    return PlainValidator(lambda v: text_of_parts(v, types, ignored), json_schema_input_type=str | list[TextPart])


Content = Annotated[str, _texts(_TYPES)]
CallId = Annotated[str, Field(min_length=1, max_length=256)]
_SENT_BACK: dict[str, Harmless] = {  # what an answer's items bring along when they are sent back
    "id": lambda v: v is None or isinstance(v, str),
    "status": lambda v: v in (None, "completed", "incomplete"),
}


class InputMessage(Strict):
    """A message of the input."""

    not_done: ClassVar[dict[str, Harmless]] = {**_SENT_BACK, "phase": lambda v: v is None or isinstance(v, str)}

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def tell(self, turns: Turns) -> None:
        """Put it into a chat."""
        turns.text(self.role, self.content)


class InputCall(Strict):
    """A call that the model made."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **_SENT_BACK,
        **dict.fromkeys(("caller", "namespace"), is_nothing),
        "parsed_arguments": lambda v: True,  # what the client itself made of them
    }

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str

    @model_validator(mode="after")
    def _an_object(self) -> Self:
        arguments_of(self.arguments, ("arguments",))
        return self

    def tell(self, turns: Turns) -> None:
        """Put it into a chat."""
        turns.call(self.call_id, self.name, self.arguments)


class InputResult(Strict):
    """What came of a call."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **_SENT_BACK,
        **dict.fromkeys(("caller", "namespace", "name"), is_nothing),
    }

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[str, _texts(("input_text",))]

    def tell(self, turns: Turns) -> None:
        """Put it into a chat."""
        turns.result(self.call_id, self.output)


class ReasoningPart(BaseModel):
    """A part of the thoughts."""

    type: Literal["reasoning_text"]
    text: str


class InputThoughts(Strict):
    """What the model thought: the text itself. Nobody here reads summaries, or what another server encrypted."""

    not_done: ClassVar[dict[str, Harmless]] = {**_SENT_BACK, "summary": is_nothing, "encrypted_content": is_nothing}

    type: Literal["reasoning"]
    content: Annotated[
        str,
        PlainValidator(
            lambda v: "" if v in (None, []) else text_of_parts(v, ("reasoning_text",)),
            json_schema_input_type=list[ReasoningPart] | None,
        ),
    ] = ""

    def tell(self, turns: Turns) -> None:
        """Put it into a chat."""
        if self.content:
            turns.thoughts(self.content)


Item = InputMessage | InputCall | InputResult | InputThoughts
_ITEMS: dict[str | None, type[Item]] = {
    None: InputMessage,
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
    "reasoning": InputThoughts,
}


def _item(value: Any) -> Item:
    if not isinstance(value, dict):
        raise mistyped("an object", value)
    kind = value.get("type")
    if not (kind is None or isinstance(kind, str)) or kind not in _ITEMS:
        raise Refused(_unknown(kind, [name for name in _ITEMS if name]), at=("type",))
    return _ITEMS[kind].model_validate(value)


def _unknown(kind: Any, known: list[str]) -> str:
    return f"Invalid value: '{echo(kind)}'. Supported values are: {', '.join(map(repr, known))}."


class FunctionTool(Strict):
    """A function that the model may call. `strict` changes nothing: a call that is required obeys the schema."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(("allowed_callers", "output_schema"), is_nothing),
        "defer_loading": is_false,
    }

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_first(cls, data: Any) -> Any:
        # A tool of the server's has fields of its own: the kind is what is not there, not they.
        if isinstance(data, dict) and "type" in data and data["type"] != "function":
            raise Refused(_unknown(data["type"], ["function"]), at=("type",))
        return data

    @property
    def tool(self) -> Tool:
        """As chats have it."""
        return offered(self.name, self.description, self.parameters, self.strict)


class NamedFunctionTool(Strict):
    """The function that has to be called."""

    type: Literal["function"]
    name: FunctionName


def _choice(value: Any) -> str | NamedTool | None:
    return choice_of(value, lambda v: named(NamedFunctionTool.model_validate(v).name))


ToolChoice = Annotated[
    str | NamedTool | None,
    PlainValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedFunctionTool | None),
]


class TextFormat(Strict):
    """What the answer's text must look like. A schema is enforced, whether `strict` is set or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(validation_alias="schema", serialization_alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for field, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=(field,))
            if self.type != "json_schema" and value is not None:
                raise Refused("'{param}' is only allowed where type is 'json_schema'.", at=(field,))
        return self

    @property
    def form(self) -> ResponseFormat:
        """As chats have it."""
        if self.type != "json_schema":
            return ResponseFormat.model_construct(type=self.type)
        schema = JsonSchema.model_construct(name=self.name or "", schema_=self.schema_)
        return ResponseFormat.model_construct(type=self.type, json_schema=schema)


class TextOptions(Strict):
    """How the answer's text is written."""

    not_done: ClassVar[dict[str, Harmless]] = {"verbosity": lambda v: v in (None, "medium")}

    format: TextFormat | None = None


class Reasoning(Strict):
    """How hard the model thinks, where its chat template asks for it. Thoughts come whole: there are no summaries."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(("summary", "generate_summary", "mode"), is_nothing),
        "context": lambda v: v in (None, "auto"),
    }

    effort: Effort | None = None


def _included(value: Any) -> Any:
    raise Refused(f"Unsupported value: '{echo(value)}': an answer has nothing to add.", code="unsupported_value")


def _one_message(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[
    list[Annotated[Item, PlainValidator(_item, json_schema_input_type=Item)]],
    Field(min_length=1, max_length=MAX_MESSAGES),
]
Input = Annotated[Items, BeforeValidator(_one_message, json_schema_input_type=str | Items)]


class ResponsesChat(ChatBody):
    """The chat that a response is made of."""

    def place(self, at: Path) -> Path:
        """See `ChatBody`."""
        if at[:1] == ("response_format",):
            return ("text", "format", *at[2:])
        if at[:1] == ("reasoning_effort",):
            return ("reasoning", "effort")
        if at[:1] == ("tools",):
            return (*at[:2], *at[3:])
        return tuple(part for part in at if part != "function") if at[:1] == ("tool_choice",) else at


class ResponsesBody(Strict):
    """POST /v1/responses. `input` as a string is one message of a user's."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(
            ("previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management", "moderation"),
            is_nothing,
        ),
        "prompt_cache_options": is_nothing,
        **dict.fromkeys(("store", "background"), is_false),
        "truncation": lambda v: v in (None, "disabled"),
        "top_logprobs": lambda v: v is None or (v == 0 and v is not False),
        "stream_options": lambda v: v is None or v in ({}, {"include_obfuscation": False}),
    }

    model: str
    input: Input
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Annotated[str, PlainValidator(_included, json_schema_input_type=str)]] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    user: Label | None = None
    metadata: Metadata | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        self.chat.check_grammar()
        return self

    @cached_property
    def chat(self) -> ResponsesChat:
        """The same as /v1/chat/completions would be asked."""
        turns = Turns(joined=False)
        for item in self.input:
            item.tell(turns)
        said = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        form = self.text.format if self.text else None
        return ResponsesChat.model_construct(
            model=self.model,
            messages=said + turns.messages,
            tools=[tool.tool for tool in self.tools or ()],
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=form.form if form else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
        )
