"""Where a chat template runs: a checkpoint's own in a process with limits, one that ships with Echelon right here."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from router.text.templates import ChatTemplate, Conversation


class Renderer(Protocol):
    """Conversations to prompt text."""

    def start(self) -> None:
        """Get ready ahead of the first conversation; costs the caller next to nothing."""

    async def render(self, conversation: Conversation) -> str:
        """The prompt's text. Raises InvalidRequest: the template refuses the messages, or fails on them."""

    def close(self) -> None:
        """Whatever `start` or `render` started has ended."""


class DirectRenderer:
    """Renders in this process and at once. For templates that are known to be harmless, whatever the messages."""

    def __init__(self, template: ChatTemplate, *, now: Callable[[], datetime] = datetime.now) -> None:
        self._template, self._now = template, now

    def start(self) -> None:
        """Nothing to do."""

    async def render(self, conversation: Conversation) -> str:
        """The prompt's text."""
        return self._template.render(conversation, self._now())

    def close(self) -> None:
        """Nothing to do."""
