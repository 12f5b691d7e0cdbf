"""Bodies of /v1/messages as Anthropic's clients send them, over the chat that there is.

Text, functions and thoughts. What is not served (images, tools of the server's, ...) is refused by name, unless its
value asks for nothing. As documented there, messages of one role in a row are one turn, and a last message of the
assistant's is continued. Two things are taken that change nothing here: `budget_tokens`, since only `max_tokens` ends
thoughts, and the signature of thoughts that are sent back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, StringConstraints, TypeAdapter, model_validator

from router.protocol.errors import echo
from router.protocol.fields import MAX_PARTS, Stop, TextPart, text_of_parts
from router.protocol.openai import MAX_MESSAGES, MAX_TOKENS, ChatBody, ChatMessage, Label
from router.protocol.strict import Harmless, Strict, is_false, is_nothing
from router.protocol.structured import JsonSchema, Path, ResponseFormat
from router.protocol.tools import MAX_TOOLS, NamedTool, Tool, named, offered
from router.protocol.turns import Turns
from router.protocol.validation import Refused, mistyped

MIN_BUDGET = 1024  # tokens, as documented there
_PARTS = ("cache_control", "citations")  # of a part of text; both change nothing of the answer
Text = Annotated[
    str, PlainValidator(lambda v: text_of_parts(v, ("text",), _PARTS), json_schema_input_type=str | list[TextPart])
]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


def _is_cache_control(value: Any) -> bool:
    return value is None or isinstance(value, dict)  # prefixes are cached without being asked


class TextBlock(Strict):
    """A piece of text."""

    not_done: ClassVar[dict[str, Harmless]] = {"cache_control": _is_cache_control, "citations": lambda v: True}

    type: Literal["text"]
    text: str

    def tell(self, turns: Turns, role: str) -> None:
        """Put it into a chat."""
        turns.text(role, self.text)


class ThinkingBlock(Strict):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # of whoever made it; nobody checks it here

    def tell(self, turns: Turns, role: str) -> None:
        """Put it into a chat."""
        turns.thoughts(self.thinking)


class ToolUseBlock(Strict):
    """A call that the model made."""

    not_done: ClassVar[dict[str, Harmless]] = {
        "cache_control": _is_cache_control,
        **dict.fromkeys(("caller", "toolset_name"), is_nothing),
    }

    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, Any]

    def tell(self, turns: Turns, role: str) -> None:
        """Put it into a chat."""
        turns.call(self.id, self.name, json.dumps(self.input))


class ToolResultBlock(Strict):
    """What came of a call. `is_error` changes nothing: chat templates have no place for it, the content says it."""

    not_done: ClassVar[dict[str, Harmless]] = {
        "cache_control": _is_cache_control,
        "is_error": lambda v: v is None or isinstance(v, bool),
        "toolset_name": is_nothing,
    }

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Annotated[
        str,
        PlainValidator(
            lambda v: "" if v in (None, []) else text_of_parts(v, ("text",), _PARTS),
            json_schema_input_type=str | list[TextPart] | None,
        ),
    ] = ""

    def tell(self, turns: Turns, role: str) -> None:
        """Put it into a chat."""
        turns.result(self.tool_use_id, self.content)


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
_BLOCKS: dict[str, type[Block]] = {
    "text": TextBlock,
    "tool_result": ToolResultBlock,
    "tool_use": ToolUseBlock,
    "thinking": ThinkingBlock,
}
_WHOSE = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant"}


def _block(value: Any) -> Block:
    if not isinstance(value, dict):
        raise mistyped("an object", value)
    kind = value.get("type")
    if kind is None:
        raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=("type",))
    if not isinstance(kind, str) or kind not in _BLOCKS:
        known = ", ".join(map(repr, _BLOCKS))
        raise Refused(f"Invalid value: '{echo(kind)}'. Supported values are: {known}.", at=("type",))
    return _BLOCKS[kind].model_validate(value)


Blocks = Annotated[
    list[Annotated[Block, PlainValidator(_block, json_schema_input_type=Block)]],
    Field(min_length=1, max_length=MAX_PARTS),
]
_BLOCK_LIST: TypeAdapter[list[Block]] = TypeAdapter(Blocks)


def _content(value: Any) -> list[Block]:
    if isinstance(value, str):
        return [TextBlock.model_construct(type="text", text=value)]
    if isinstance(value, list):
        return _BLOCK_LIST.validate_python(value)
    raise mistyped("a string or an array of content blocks", value)


class Turn(Strict):
    """One message."""

    role: Literal["user", "assistant"]
    content: Annotated[list[Block], PlainValidator(_content, json_schema_input_type=str | Blocks)]

    @model_validator(mode="after")
    def _whose(self) -> Self:
        for i, block in enumerate(self.content):
            if _WHOSE.get(block.type, self.role) != self.role:
                words = f"'{block.type}' is only allowed in messages of role '{_WHOSE[block.type]}'."
                raise Refused(f"Invalid '{{param}}': {words}", at=("content", i, "type"))
        return self


class CustomTool(Strict):
    """A function that the model may call. `strict` changes nothing: a call that is required obeys the schema."""

    not_done: ClassVar[dict[str, Harmless]] = {
        "cache_control": _is_cache_control,
        "eager_input_streaming": lambda v: v is None or isinstance(v, bool),  # arguments come as they grow
        "defer_loading": is_false,
        **dict.fromkeys(("allowed_callers", "input_examples"), is_nothing),
    }

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_first(cls, data: Any) -> Any:
        # A tool of the server's has fields of its own: the kind is what is not there, not they.
        if isinstance(data, dict) and data.get("type") not in (None, "custom"):
            raise Refused(f"Invalid value: '{echo(data['type'])}'. Supported values are: 'custom'.", at=("type",))
        return data

    @property
    def tool(self) -> Tool:
        """As chats have it."""
        return offered(self.name, self.description, self.input_schema, self.strict)


class ToolChoice(Strict):
    """Whether the answer calls: as the model likes (`auto`), some function (`any`), one by name (`tool`), or not."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=("name",))
        if self.type != "tool" and self.name is not None:
            raise Refused("'{param}' is only allowed where type is 'tool'.", at=("name",))
        return self

    @property
    def choice(self) -> str | NamedTool:
        """As chats have it."""
        return named(self.name) if self.name is not None else {"any": "required"}.get(self.type, self.type)


class Thinking(Strict):
    """Whether there are to be thoughts, where the model's chat template asks. Nothing holds them to the budget."""

    not_done: ClassVar[dict[str, Harmless]] = {"display": is_nothing}

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=MIN_BUDGET, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _budget(self) -> Self:
        at = ("budget_tokens",)
        if self.type == "enabled" and self.budget_tokens is None:
            raise Refused("Missing required parameter: '{param}'.", code="missing_required_parameter", at=at)
        if self.type != "enabled" and self.budget_tokens is not None:
            raise Refused("'{param}' is only allowed where type is 'enabled'.", at=at)
        return self


class OutputFormat(Strict):
    """What the answer's text must look like."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(validation_alias="schema", serialization_alias="schema")]


class OutputConfig(Strict):
    """How the answer is written; `effort` where the model's chat template asks for it."""

    not_done: ClassVar[dict[str, Harmless]] = {"task_budget": is_nothing}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    """Who asks, among the caller's own users."""

    user_id: Label | None = None


class MessagesChat(ChatBody):
    """The chat that a message is made of."""

    thinking: Literal["enabled", "disabled", "adaptive"] | None = None

    @property
    def thinks(self) -> bool | None:
        """See `ChatBody`."""
        return {"enabled": True, "disabled": False}.get(self.thinking or "")

    def place(self, at: Path) -> Path:
        """See `ChatBody`."""
        if at[:1] == ("response_format",):
            return ("output_config", "format", *at[2:])
        if at[:1] == ("reasoning_effort",):
            return ("output_config", "effort")
        if at[:1] == ("tools",):
            inside = ("input_schema",) if at[3:4] == ("parameters",) else at[3:4]
            return (*at[:2], *inside, *at[4:])
        return tuple(part for part in at if part != "function") if at[:1] == ("tool_choice",) else at


class CountBody(Strict):
    """POST /v1/messages/count_tokens."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(("mcp_servers", "container", "context_management", "output_format", "diagnostics"), is_nothing),
        **dict.fromkeys(("inference_geo", "speed", "user_profile_id", "workspace_id"), is_nothing),
        "cache_control": _is_cache_control,
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        last = self.messages[-1]
        if last.role == "assistant" and last.content[-1].type != "text":
            raise Refused(
                "Invalid '{param}': a last message of the assistant's is continued, and so must end with text.",
                at=("messages", len(self.messages) - 1, "content", len(last.content) - 1, "type"),
            )
        self.chat.check_grammar()
        return self

    @cached_property
    def chat(self) -> MessagesChat:
        """The same as /v1/chat/completions would be asked."""
        return self._chat()

    def _chat(self, **more: Any) -> MessagesChat:
        choice, output = self.tool_choice, self.output_config or OutputConfig()
        form = None
        if output.format is not None:
            schema = JsonSchema.model_construct(name="answer", schema_=output.format.schema_)
            form = ResponseFormat.model_construct(type="json_schema", json_schema=schema)
        return MessagesChat.model_construct(
            model=self.model,
            messages=_said(self.system, self.messages),
            continue_final_message=self.messages[-1].role == "assistant",
            tools=[tool.tool for tool in self.tools or ()],
            tool_choice=choice.choice if choice else None,
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            response_format=form,
            thinking=self.thinking.type if self.thinking else None,
            reasoning_effort=output.effort,
            **more,
        )


def _said(system: str | None, messages: Sequence[Turn]) -> list[ChatMessage]:
    turns = Turns(joined=True)
    if system:
        turns.text("system", system)
    for turn in messages:
        for block in turn.content:
            block.tell(turns, turn.role)
    return turns.messages


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_sequences: Stop = ()
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None  # 0: off
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _budget(self) -> Self:
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and budget >= self.max_tokens:
            raise Refused(
                f"Invalid '{{param}}': expected a value < max_tokens ({self.max_tokens}), but got {budget} instead.",
                at=("thinking", "budget_tokens"),
            )
        return self

    @cached_property
    def chat(self) -> MessagesChat:
        """The same as /v1/chat/completions would be asked."""
        return self._chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
