"""Streams whose events show the ids of what they bring (`return_token_ids`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.parsers.pieces import Piece
from router.protocol.answers import ChatFormat, CompletionFormat, ShownToken, Usage
from workers.api.request import TokenLogprobs


class IdsFormat:
    """`form`, with `token_ids` in the choice of every event: those that `take[choice]()` gives, which are then shown.

    The prompt's ids are in the first event, or, of completions, in the first of each choice.
    """

    def __init__(self, form: ChatFormat | CompletionFormat, take: Sequence[Callable[[], Sequence[int]]]) -> None:
        self._form, self._take = form, take
        self.content_type, self.done = form.content_type, form.done
        self.body, self.error = form.body, form.error

    def opening(self, index: int) -> str:
        """See `Format`."""
        return self._form.with_prompt_ids(index, self._form.with_ids(self._form.opening(index), ()))

    def prompt(self, index: int, scores: Sequence[TokenLogprobs]) -> str:
        """As `form` writes the prompt's log-probabilities."""
        return self._form.with_ids(self._form.prompt(index, scores), ())

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """See `Format`."""
        return self._form.with_ids(self._form.text(index, text, tokens), self._take[index]())

    def parts(self, index: int, pieces: Sequence[Piece], tokens: Sequence[ShownToken] | None) -> str:
        """See `PartsFormat`. The first of several events shows the ids of all."""
        assert isinstance(self._form, ChatFormat), "only chats are parsed"
        shown, events = "", self._form.parts(index, pieces, tokens).split("\n\n")
        for event in events[:-1]:
            shown += self._form.with_ids(f"{event}\n\n", () if shown else self._take[index]())
        return shown

    def finish(self, index: int, reason: str) -> str:
        """See `Format`. With what no event before has shown."""
        return self._form.with_ids(self._form.finish(index, reason), self._take[index]())

    def usage(self, usage: Usage) -> str:
        """See `Format`."""
        return self._form.usage(usage)
