"""Streams whose every event tells the usage so far (`stream_options.continuous_usage_stats`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.parsers.pieces import Piece
from router.protocol.answers import ChatFormat, CompletionFormat, ShownToken, Usage
from router.protocol.sse import dumps
from router.protocol.token_ids import IdsFormat

_OPEN = '"usage":null}\n\n'  # how the events of a stream that tells its usage at its end are closed


class CountedFormat:
    """`form`, whose events end with an open usage, with that usage filled in. Tokens are those of all choices."""

    def __init__(self, form: ChatFormat | CompletionFormat | IdsFormat) -> None:
        self._form = form
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)
        self.content_type, self.done = form.content_type, form.done
        self.body, self.usage, self.error = form.body, form.usage, form.error

    def follow(self, usage: Callable[[], Usage]) -> None:
        """Events tell what `usage` says when they are made."""
        self._usage = usage

    def counted(self, events: str) -> str:
        """Events of the form's, with the usage."""
        if _OPEN not in events:
            return events
        return events.replace(_OPEN, f'"usage":{dumps(self._usage().as_json())}}}\n\n')

    def opening(self, index: int) -> str:
        """See `Format`."""
        return self.counted(self._form.opening(index))

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """See `Format`."""
        return self.counted(self._form.text(index, text, tokens))

    def parts(self, index: int, pieces: Sequence[Piece], tokens: Sequence[ShownToken] | None) -> str:
        """See `PartsFormat`."""
        assert not isinstance(self._form, CompletionFormat), "only chats are parsed"
        events = self._form.parts(index, pieces, tokens).split("\n\n")
        return "".join([self.counted(f"{event}\n\n") for event in events[:-1]])

    def finish(self, index: int, reason: str) -> str:
        """See `Format`."""
        return self.counted(self._form.finish(index, reason))
