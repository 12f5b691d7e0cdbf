"""/v1/messages: bodies, answers, events and errors as Anthropic's clients know them, over the chat that there is.

Text in, text out. What is not served (images, tools, extended thinking, ...) is refused by name, unless its value asks
for nothing. As documented there, messages of one role in a row are one turn, and a last message of the assistant's is
continued.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, PlainValidator

from router.protocol.answers import ChoiceAnswer, ShownToken, Usage
from router.protocol.fields import Stop, TextPart, text_of_parts
from router.protocol.openai import MAX_MESSAGES, MAX_TOKENS, ChatBody, ChatMessage, Label
from router.protocol.sse import CONTENT_TYPE, dumps, quoted
from router.protocol.strict import Harmless, Strict, is_nothing

_PARTS = ("cache_control", "citations")  # of a part of text; both change nothing of the answer
Content = Annotated[
    str, PlainValidator(lambda v: text_of_parts(v, ("text",), _PARTS), json_schema_input_type=str | list[TextPart])
]


def _thinks_not(value: Any) -> bool:
    return value is None or value == {"type": "disabled"}


class Turn(Strict):
    """One message."""

    role: Literal["user", "assistant"]
    content: Content


class Metadata(Strict):
    """Who asks, among the caller's own users."""

    user_id: Label | None = None


class CountBody(Strict):
    """POST /v1/messages/count_tokens."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(
            (
                "tools",
                "mcp_servers",
                "container",
                "context_management",
                "output_config",
                "output_format",
                "diagnostics",
            ),
            is_nothing,
        ),
        **dict.fromkeys(("inference_geo", "speed", "user_profile_id", "workspace_id"), is_nothing),
        "cache_control": lambda v: v is None or isinstance(v, dict),  # prefixes are cached without being asked
        "tool_choice": lambda v: v is None or v in ({"type": "auto"}, {"type": "none"}),
        "thinking": _thinks_not,
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None

    @property
    def conversation(self) -> list[ChatMessage]:
        """The same as a chat's messages."""
        said = [ChatMessage(role="system", content=self.system)] if self.system else []
        for turn in self.messages:
            if said and said[-1].role == turn.role:
                said[-1] = ChatMessage(role=turn.role, content=f"{said[-1].content}\n{turn.content}")
            else:
                said.append(ChatMessage(role=turn.role, content=turn.content))
        return said

    def as_chat(self, **more: Any) -> ChatBody:
        """The same as /v1/chat/completions would be asked."""
        continues = self.messages[-1].role == "assistant"
        return ChatBody.model_construct(
            model=self.model, messages=self.conversation, continue_final_message=continues, **more
        )


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

    def as_chat(self, **more: Any) -> ChatBody:
        """The same as /v1/chat/completions would be asked."""
        return super().as_chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            **more,
        )


class Ending(Protocol):
    """A choice, which says how it ended."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that it ended with, if it did."""


class MessagesFormat:
    """One choice as one block of text."""

    content_type = CONTENT_TYPE
    done = ""

    def __init__(self, id: str, model: str) -> None:
        self._fields: dict[str, Any] = {"id": id, "type": "message", "role": "assistant", "model": model}
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)
        self._choice: Ending | None = None

    def follow(self, choice: Ending, usage: Callable[[], Usage]) -> None:
        """The answer is `choice`; events tell what `usage` says when they are made."""
        self._choice, self._usage = choice, usage

    def opening(self, index: int) -> str:
        """The message, still empty, and its block."""
        started = {
            **self._fields,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._usage()),
        }
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event({"type": "message_start", "message": started}) + _event(block)

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """New text."""
        delta = f'{{"type":"text_delta","text":{quoted(text)}}}'
        return f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":0,"delta":{delta}}}\n\n'

    def finish(self, index: int, reason: str) -> str:
        """The end of the block, the reason with the counts, the end of the message."""
        end = {"type": "message_delta", "delta": self._ending(reason), "usage": _usage(self._usage())}
        stop = {"type": "content_block_stop", "index": 0}
        return _event(stop) + _event(end) + _event({"type": "message_stop"})

    def usage(self, usage: Usage) -> str:
        """It came with the reason."""
        return ""

    def error(self, body: bytes) -> str:
        """The error as an event."""
        return f"event: error\ndata: {error_body(body).decode('ascii')}\n\n"

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        (choice,) = choices
        content = [{"type": "text", "text": choice.text}] if choice.text else []
        fields = {**self._fields, "content": content, **self._ending(choice.finish), "usage": _usage(usage)}
        return dumps(fields).encode("ascii")

    def _ending(self, reason: str) -> dict[str, Any]:
        stopped_by = None if self._choice is None else self._choice.stopped_by
        if reason != "stop":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "end_turn" if stopped_by is None else "stop_sequence", "stop_sequence": stopped_by}


_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STATUS = {"rate_limit_error": 429, "service_unavailable_error": 503, "invalid_request_error": 400}


def error_body(body: bytes, status: int | None = None) -> bytes:
    """An error's body of ours as Anthropic's clients read it; `status` None: of a stream, whose status is sent."""
    error = json.loads(body)["error"]
    status = status or _STATUS.get(error["type"], 500)
    kind = _ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return dumps({"type": "error", "error": {"type": kind, "message": error["message"]}}).encode("ascii")


def _event(fields: dict[str, Any]) -> str:
    return f"event: {fields['type']}\ndata: {dumps(fields)}\n\n"


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
