"""What a foreign answer cost, in tokens: as the node says, or counted."""

from __future__ import annotations

import json
from typing import Any

CHARACTERS_PER_TOKEN = 4
_MOST_PENDING = 1 << 20  # bytes of one event


def prompt_estimate(body: dict[str, Any]) -> int:
    """Tokens of the prompt of an OpenAI body: ids as they are, text by its characters. At least 1."""
    return max(round(_size(body.get("prompt")) + _size(body.get("messages"))), 1)


def _size(value: Any) -> float:
    """Text in messages and in their parts counts; images and the like are not estimated."""
    match value:
        case str():
            return len(value) / CHARACTERS_PER_TOKEN
        case list():
            return sum(1.0 if isinstance(item, int) else _size(item) for item in value)
        case dict():
            return _size(value.get("content")) + _size(value.get("text"))
    return 0.0


def usage_of(body: bytes, prompt_tokens: int) -> tuple[int, int, int]:
    """(prompt, cached, output) tokens that a whole answer names; without them the estimate and nothing."""
    try:
        return _counts(json.loads(body), prompt_tokens) or (prompt_tokens, 0, 0)
    except ValueError:
        return prompt_tokens, 0, 0


def _counts(answer: Any, prompt_tokens: int) -> tuple[int, int, int] | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    counts = usage.get("prompt_tokens", prompt_tokens), cached or 0, usage.get("completion_tokens", 0)
    return counts if all(isinstance(n, int) and n >= 0 for n in counts) else None


class SseTally:
    """Reads a stream of events as it passes by: an event with choices is taken for a token, unless usage comes."""

    def __init__(self) -> None:
        self.tokens = 0
        self.done = False
        self._usage: tuple[int, int, int] | None = None
        self._rest = b""

    def feed(self, part: bytes) -> None:
        """The next bytes."""
        *events, self._rest = (self._rest + part.replace(b"\r\n", b"\n")).split(b"\n\n")
        self._rest = self._rest[-_MOST_PENDING:]
        for event in events:
            data = event.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self.done = True
            elif b'"usage"' in data and (usage := self._read(data)) is not None:
                self._usage = usage
            if b'"content"' in data or b'"text"' in data:
                self.tokens += b'"content":""' not in data.replace(b" ", b"")

    def counts(self, prompt_tokens: int) -> tuple[int, int, int]:
        """(prompt, cached, output) tokens so far."""
        return self._usage or (prompt_tokens, 0, self.tokens)

    @staticmethod
    def _read(data: bytes) -> tuple[int, int, int] | None:
        try:
            return _counts(json.loads(data), 0)
        except ValueError:
            return None
