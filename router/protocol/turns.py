"""A chat's messages, put together from what other APIs send: texts, thoughts, calls and their results in a row."""

from __future__ import annotations

from typing import Any

from router.protocol.openai import ChatMessage
from router.protocol.tools import CalledFunction, ToolCall


class Turns:
    """What was said, in order. `joined`: all that one role says in a row is one message, its texts a line each.

    Without `joined` a text is a message of its own, unless the assistant's last one, of thoughts or calls, has none.
    """

    def __init__(self, *, joined: bool) -> None:
        self._joined = joined
        self._fields: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[ChatMessage]:
        """As a chat takes them."""
        return [ChatMessage.model_construct(**fields) for fields in self._fields]

    def text(self, role: str, text: str) -> None:
        """`role` says `text`."""
        last = self._last(role)
        if last is None or not (
            self._joined or (role == "assistant" and (not last["content"] or "tool_calls" in last))
        ):
            self._fields.append({"role": role, "content": text})
        else:
            last["content"] = _joined(last["content"], text)

    def thoughts(self, text: str) -> None:
        """The assistant thinks `text`, ahead of what it says or calls next."""
        last = self._last("assistant")
        if last is None or not (self._joined or not (last["content"] or "tool_calls" in last)):
            self._fields.append({"role": "assistant", "content": "", "reasoning_content": text})
        else:
            last["reasoning_content"] = _joined(last.get("reasoning_content", ""), text)

    def call(self, id: str, name: str, arguments: str) -> None:
        """The assistant calls a function; `arguments` are a JSON object as text."""
        last = self._last("assistant")
        if last is None:
            last = {"role": "assistant", "content": ""}
            self._fields.append(last)
        function = CalledFunction.model_construct(name=name, arguments=arguments)
        last.setdefault("tool_calls", []).append(ToolCall.model_construct(id=id, function=function))

    def result(self, call_id: str, text: str) -> None:
        """What came of a call."""
        self._fields.append({"role": "tool", "content": text, "tool_call_id": call_id})

    def _last(self, role: str) -> dict[str, Any] | None:
        """The last message, if it is that role's."""
        return self._fields[-1] if self._fields and self._fields[-1]["role"] == role else None


def _joined(before: str, text: str) -> str:
    return f"{before}\n{text}" if before else text
