"""What a pipeline may be asked: a text, a conversation, or a list of either. Images are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.api.errors import InvalidRequest

Conversation = list[dict[str, Any]]
Prompt = str | Conversation


def prompts_of(asked: Any) -> tuple[list[Prompt], bool]:
    """All prompts, and whether a list of them was asked (so that a list is the answer).

    A list of messages is one conversation. Raises InvalidRequest.
    """
    if isinstance(asked, str | tuple) or _is_conversation(asked):
        return [_one(asked)], False
    if not isinstance(asked, Sequence) or not asked:
        raise InvalidRequest(f"a prompt is a text, a list of messages, or a list of them, not {asked!r:.100}")
    return [_one(one) for one in asked], True


def _is_conversation(asked: Any) -> bool:
    return isinstance(asked, Sequence) and bool(asked) and isinstance(asked[0], Mapping)


def _one(asked: Any) -> Prompt:
    if isinstance(asked, str):
        return asked
    if isinstance(asked, tuple):
        raise InvalidRequest("a prompt with images, (text, image), is not done yet: images are not served")
    if not _is_conversation(asked):
        raise InvalidRequest(f"a prompt is a text or a list of messages, not {asked!r:.100}")
    messages = [dict(message) for message in asked]
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list) and any(isinstance(p, Mapping) and p.get("type") == "image_url" for p in parts):
            raise InvalidRequest("a message with an image_url is not done yet: images are not served")
    return messages
