"""/v1/responses: bodies, answers and events as OpenAI's clients know them, over the chat that there is.

Text in, text out, and nothing is stored: `store` true and what would need it (`previous_response_id`, `conversation`,
`background`) are refused by name, as are tools, reasoning and structured output, unless they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, model_validator

from router.protocol.answers import ChoiceAnswer, ShownToken, Usage
from router.protocol.fields import TextPart, text_of_parts
from router.protocol.openai import MAX_MESSAGES, MAX_TOKENS, ChatBody, ChatMessage, Label, Metadata, ServiceTier
from router.protocol.sse import CONTENT_TYPE, dumps
from router.protocol.strict import Harmless, Strict, is_false, is_nothing

_TYPES = ("input_text", "output_text", "text")
Content = Annotated[
    str,
    PlainValidator(
        lambda v: text_of_parts(v, _TYPES, ("annotations", "logprobs")), json_schema_input_type=str | list[TextPart]
    ),
]


class InputItem(Strict):
    """A message of the input; what an answer brings along is taken when it is sent back."""

    not_done: ClassVar[dict[str, Harmless]] = {
        "id": lambda v: v is None or isinstance(v, str),
        "status": lambda v: v in (None, "completed", "incomplete"),
        "phase": lambda v: v is None or isinstance(v, str),
    }

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


def _plain_text(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return value.keys() <= {"format", "verbosity"} and (
        value.get("format") in (None, {"type": "text"}) and value.get("verbosity") in (None, "medium")
    )


class ResponsesBody(Strict):
    """POST /v1/responses. `input` as a string is one message of a user's."""

    not_done: ClassVar[dict[str, Harmless]] = {
        **dict.fromkeys(
            ("tools", "include", "previous_response_id", "conversation", "prompt", "max_tool_calls"), is_nothing
        ),
        **dict.fromkeys(("store", "background"), is_false),
        "tool_choice": lambda v: v in (None, "none", "auto"),
        "parallel_tool_calls": lambda v: v is None or isinstance(v, bool),
        "reasoning": lambda v: v is None or (isinstance(v, dict) and all(x in (None, "none") for x in v.values())),
        "text": _plain_text,
        "truncation": lambda v: v in (None, "disabled"),
        "top_logprobs": lambda v: v is None or (v == 0 and v is not False),
        "stream_options": lambda v: v is None or v in ({}, {"include_obfuscation": False}),
    }

    model: str
    input: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _one_message(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("input"), str):
            return {**data, "input": [{"role": "user", "content": data["input"]}]}
        return data

    def as_chat(self) -> ChatBody:
        """The same as /v1/chat/completions would be asked."""
        said = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        return ChatBody.model_construct(
            model=self.model,
            messages=said + [ChatMessage(role=item.role, content=item.content) for item in self.input],
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
        )


class ResponsesFormat:
    """One choice as one message with one part of text."""

    content_type = CONTENT_TYPE
    done = ""

    def __init__(self, id: str, created: int, asked: ResponsesBody) -> None:
        self._item = f"msg_{id}"
        self._fields: dict[str, Any] = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": created,
            "model": asked.model,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "user": asked.user,
            "background": False,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)
        self._numbers = count()
        self._said: list[str] = []
        self._where = {"item_id": self._item, "output_index": 0, "content_index": 0}

    def follow(self, usage: Callable[[], Usage]) -> None:
        """The last event tells what `usage` says then."""
        self._usage = usage

    def opening(self, index: int) -> str:
        """The response, still empty, its message, and the message's part."""
        started = self._response("in_progress", [], None)
        item = {**self._message("", "in_progress"), "content": []}
        return (
            self._event("response.created", response=started)
            + self._event("response.in_progress", response=started)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._event("response.content_part.added", **self._where, part=_part(""))
        )

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """New text."""
        self._said.append(text)
        return self._event("response.output_text.delta", **self._where, delta=text, logprobs=[])

    def finish(self, index: int, reason: str) -> str:
        """The whole text, part, message and response once more."""
        text = "".join(self._said)
        item = self._message(text, "completed" if reason == "stop" else "incomplete")
        status = item["status"]
        return (
            self._event("response.output_text.done", **self._where, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._where, part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=self._response(status, [item], self._usage()))
        )

    def usage(self, usage: Usage) -> str:
        """It came with the response."""
        return ""

    def error(self, body: bytes) -> str:
        """The error as an event."""
        error = json.loads(body)["error"]
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        (choice,) = choices
        item = self._message(choice.text, "completed" if choice.finish == "stop" else "incomplete")
        return dumps(self._response(item["status"], [item], usage)).encode("ascii")

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        return {
            **self._fields,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": None if usage is None else _usage(usage),
        }

    def _event(self, kind: str, **fields: Any) -> str:
        return f"event: {kind}\ndata: {dumps({'type': kind, 'sequence_number': next(self._numbers), **fields})}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
