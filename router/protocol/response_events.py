"""Answers and events of /v1/responses as OpenAI's clients read them: thoughts, text and calls are items in a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from router.parsers.pieces import Block, CallBegins, Content, Reasoning
from router.protocol.answers import ChoiceAnswer, Usage
from router.protocol.blocks import BlockEvents
from router.protocol.responses import ResponsesBody, TextFormat
from router.protocol.sse import CONTENT_TYPE, dumps, quoted
from router.protocol.tools import NamedTool


class ResponsesFormat(BlockEvents):
    """One choice."""

    content_type = CONTENT_TYPE
    done = ""

    def __init__(self, id: str, created: int, asked: ResponsesBody) -> None:
        super().__init__()
        self._id = id
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
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": _format(asked.text.format if asked.text else None)},
            "tool_choice": _choice(asked.tool_choice),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "truncation": "disabled",
        }
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)
        self._numbers = count()

    def follow(self, usage: Callable[[], Usage]) -> None:
        """The last event tells what `usage` says then."""
        self._usage = usage

    def opening(self, index: int) -> str:
        """The response, still empty."""
        started = self._response("in_progress", [], None)
        return self._event("response.created", response=started) + self._event("response.in_progress", response=started)

    def begun(self, at: int, block: Block) -> str:
        """The item, still empty, and its part."""
        item = self._item(at, Block(block.first), "in_progress")
        if isinstance(block.first, CallBegins):
            return self._event("response.output_item.added", output_index=at, item=item)
        (part,) = item["content"]
        item["content"] = []
        return self._event("response.output_item.added", output_index=at, item=item) + self._event(
            "response.content_part.added", item_id=item["id"], output_index=at, content_index=0, part=part
        )

    def more(self, at: int, block: Block, text: str) -> str:
        """New text, thoughts or arguments."""
        name = _DELTAS[type(block.first)]
        rest = "" if name == _CALL else ',"content_index":0'
        rest += ',"logprobs":[]' if name == _TEXT else ""
        return (
            f'event: {name}.delta\ndata: {{"type":"{name}.delta","sequence_number":{next(self._numbers)},'
            f'"item_id":"{self._item_id(at, block)}","output_index":{at},"delta":{quoted(text)}{rest}}}\n\n'
        )

    def ended(self, at: int, block: Block, *, cut: bool) -> str:
        """What the item says, its part, and the item once more, whole."""
        item, text = self._item(at, block, "incomplete" if cut else "completed"), block.text
        where: dict[str, Any] = {"item_id": item["id"], "output_index": at}
        if isinstance(block.first, CallBegins):
            events = self._event(f"{_CALL}.done", **where, name=block.first.name, arguments=text)
        else:
            where["content_index"] = 0
            more: dict[str, Any] = {"logprobs": []} if isinstance(block.first, Content) else {}
            events = self._event(f"{_DELTAS[type(block.first)]}.done", **where, text=text, **more)
            events += self._event("response.content_part.done", **where, part=item["content"][0])
        return events + self._event("response.output_item.done", output_index=at, item=item)

    def finish(self, index: int, reason: str) -> str:
        """The end of the last item, and the response once more, whole. An empty answer is an empty message."""
        blocks = self.message.blocks
        events = "" if blocks else self.parts(index, (Content(""),), None)
        events += self.last_ended(len(blocks) - 1, cut=reason == "length")
        answer = self._answer(blocks, reason, self._usage())
        return events + self._event(f"response.{answer['status']}", response=answer)

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
        blocks = [] if choice.message is None else choice.message.blocks
        return dumps(self._answer(blocks or [Block(Content(""), [choice.text])], choice.finish, usage)).encode("ascii")

    def _answer(self, blocks: Sequence[Block], reason: str, usage: Usage) -> dict[str, Any]:
        status = "incomplete" if reason == "length" else "completed"
        items = [self._item(at, block, "completed") for at, block in enumerate(blocks)]
        items[-1]["status"] = status
        return self._response(status, items, usage)

    def _item_id(self, at: int, block: Block) -> str:
        return f"{_PREFIXES[type(block.first)]}_{self._id}_{at}"

    def _item(self, at: int, block: Block, status: str) -> dict[str, Any]:
        first, text = block.first, block.text
        item: dict[str, Any] = {"id": self._item_id(at, block), "status": status}
        if isinstance(first, CallBegins):
            return {**item, "type": "function_call", "call_id": first.id, "name": first.name, "arguments": text}
        if isinstance(first, Reasoning):
            thoughts = {"type": "reasoning_text", "text": text}
            return {**item, "type": "reasoning", "summary": [], "content": [thoughts], "encrypted_content": None}
        said = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {**item, "type": "message", "role": "assistant", "content": [said]}

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


_TEXT, _THOUGHTS, _CALL = "response.output_text", "response.reasoning_text", "response.function_call_arguments"
_DELTAS = {Content: _TEXT, Reasoning: _THOUGHTS, CallBegins: _CALL}
_PREFIXES = {Content: "msg", Reasoning: "rs", CallBegins: "fc"}


def _format(form: TextFormat | None) -> dict[str, Any]:
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    return form.model_dump(by_alias=True)


def _choice(choice: str | NamedTool | None) -> Any:
    return {"type": "function", "name": choice.function.name} if isinstance(choice, NamedTool) else choice or "auto"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
