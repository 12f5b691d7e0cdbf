"""Answers, events and errors of /v1/messages as Anthropic's clients read them: thoughts, text and calls are blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic_core import from_json

from router.parsers.json_call import JsonValue
from router.parsers.pieces import Block, CallBegins, Reasoning
from router.protocol.answers import ChoiceAnswer, Usage
from router.protocol.blocks import BlockEvents
from router.protocol.messages import MessagesBody
from router.protocol.sse import CONTENT_TYPE, dumps, quoted


class Ending(Protocol):
    """A choice, which says how it ended."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that it ended with, if it did."""


class MessagesFormat(BlockEvents):
    """One choice. Signatures of thoughts are empty: nobody checks them when they come back."""

    content_type = CONTENT_TYPE
    done = ""

    def __init__(self, id: str, asked: MessagesBody) -> None:
        super().__init__()
        self._fields: dict[str, Any] = {"id": id, "type": "message", "role": "assistant", "model": asked.model}
        self._stops = asked.stop_sequences
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)
        self._choice: Ending | None = None

    def follow(self, choice: Ending, usage: Callable[[], Usage]) -> None:
        """The answer is `choice`; events tell what `usage` says when they are made."""
        self._choice, self._usage = choice, usage

    def opening(self, index: int) -> str:
        """The message, still empty."""
        started = {
            **self._fields,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._usage()),
        }
        return _event({"type": "message_start", "message": started})

    def begun(self, at: int, block: Block) -> str:
        """The block, still empty."""
        shown = _block(Block(block.first))
        return _event({"type": "content_block_start", "index": at, "content_block": shown})

    def more(self, at: int, block: Block, text: str) -> str:
        """New text, thoughts or arguments."""
        delta = f"{{{_DELTAS.get(type(block.first), _TEXT)}:{quoted(text)}}}"
        return f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{at},"delta":{delta}}}\n\n'

    def ended(self, at: int, block: Block, *, cut: bool) -> str:
        """The end of the block; thoughts end with their signature."""
        signed = ""
        if isinstance(block.first, Reasoning):
            delta = {"type": "signature_delta", "signature": ""}
            signed = _event({"type": "content_block_delta", "index": at, "delta": delta})
        return signed + _event({"type": "content_block_stop", "index": at})

    def finish(self, index: int, reason: str) -> str:
        """The end of the last block, the reason with the counts, the end of the message."""
        end = {"type": "message_delta", "delta": self._ending(reason), "usage": _usage(self._usage())}
        last = self.last_ended(len(self.message.blocks) - 1, cut=reason == "length")
        return last + _event(end) + _event({"type": "message_stop"})

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
        if choice.message is not None:
            content = [_block(block) for block in choice.message.blocks]
        fields = {**self._fields, "content": content, **self._ending(choice.finish), "usage": _usage(usage)}
        return dumps(fields).encode("ascii")

    def _ending(self, reason: str) -> dict[str, Any]:
        stopped_by = None if self._choice is None else self._choice.stopped_by
        if reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if stopped_by in self._stops:  # and by no word of the chat template's
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
        return {"stop_reason": "tool_use" if reason == "tool_calls" else "end_turn", "stop_sequence": None}


_TEXT = '"type":"text_delta","text"'
_DELTAS = {
    Reasoning: '"type":"thinking_delta","thinking"',
    CallBegins: '"type":"input_json_delta","partial_json"',
}


def _block(block: Block) -> dict[str, Any]:
    first, text = block.first, block.text
    if isinstance(first, CallBegins):
        return {"type": "tool_use", "id": first.id, "name": first.name, "input": called_with(text)}
    if isinstance(first, Reasoning):
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def called_with(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object: of an answer that was cut, as far as they came; what is no JSON by itself under
    the name that Anthropic documents for it.
    """
    if not arguments.strip():
        return {}
    extent = JsonValue()
    extent.push(arguments.lstrip())
    try:
        value = from_json(arguments, allow_inf_nan=False, allow_partial=False if extent.done else "trailing-strings")
        dumps(value)  # numbers that JSON holds, and Python does not
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


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
    message, place = error["message"], error["param"]
    if place and f"'{place}'" not in message:  # there is no field for it
        message = f"{place}: {message}"
    return dumps({"type": "error", "error": {"type": kind, "message": message}}).encode("ascii")


def _event(fields: dict[str, Any]) -> str:
    return f"event: {fields['type']}\ndata: {dumps(fields)}\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
