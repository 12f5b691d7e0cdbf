"""The text side of one choice of one answer: deltas in, text out, until its one finish reason."""

from __future__ import annotations

from typing import Any

from router.parsers.pieces import CallBegins, Parser, Pieces, Reasoning
from router.protocol.answers import ShownToken
from router.text.detokenizer import Detokenizer
from router.text.stops import StopFinder
from workers.api.errors import EngineFault
from workers.api.request import Delta, FinishReason, TokenLogprobs


class Choice:
    """Journal of one choice. After `push`, `take_text` and `take_tokens` give what is new and certain.

    The token that made it stop (a stop id) is counted but not shown, and a stop string is not shown either, but where
    `stop_shown` says so. A token's log-probabilities come out with the first character of its text.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        *,
        stops: tuple[str, ...] = (),
        stop_shown: bool = False,
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        wants_prompt: bool = False,
        offset: int = 0,
        parser: Parser | None = None,
    ) -> None:
        self.index = index
        self.parser = parser  # of its text into parts; None: it is content
        self.calls = False  # whether the parser has found a tool call
        self.finish: str | None = None
        self.token_count = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0  # up to the step that brought the last of the thoughts
        self.characters = 0  # shown so far
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops, included=stop_shown) if stops else None
        self._stop_shown = stop_shown
        self._min_tokens = min_tokens
        self._offset = offset
        self._made = 0  # characters detokenized so far, shown or held
        self._waiting: list[ShownToken] | None = [] if wants_logprobs else None
        self._is_plain = not (stops or wants_logprobs or wants_prompt)  # and is not over

    def is_over(self) -> bool:
        """Whether `finish` is set."""
        return self.finish is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that it ended with, if it did."""
        return None if self._finder is None else self._finder.matched

    def push(self, delta: Delta) -> str:
        """Text that `delta` makes certain; `finish` is set with the last of it.

        Raises EngineFault when the delta reports an error or leaves a gap.
        """
        if self._is_plain and delta.finish is None and delta.error is None and delta.position == self.token_count:
            self.token_count += len(delta.token_ids)  # all but the last step of nearly every answer
            text = self._detokenizer.push(delta.token_ids)
            self.characters += len(text)
            return text
        if self.is_over():
            return ""
        if delta.position != self.token_count:
            raise EngineFault(f"choice {self.index} continues at {delta.position}, expected {self.token_count}")
        if delta.finish is FinishReason.ERROR or delta.error is not None:
            raise EngineFault(delta.error or "The engine failed.")
        if delta.finish is FinishReason.ABORT:
            raise EngineFault("The request was aborted by the server.")
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        ids = delta.token_ids
        if delta.finish is FinishReason.STOP and not self._stop_shown:
            ids = ids[:-1]
        if self._waiting is None and self._finder is None:
            self.token_count += len(delta.token_ids)
            text = self._detokenizer.push(ids)
        else:
            text = self._push_each(ids, delta)
            if self.finish is None:
                self.token_count += len(delta.token_ids) - len(ids)
        if delta.finish is not None:
            self.cached_tokens = delta.cached_tokens
            self._is_plain = False
            if self.finish is None:
                text += self._flush()
                if not self.is_over():
                    self.finish = str(delta.finish)
        self.characters += len(text)
        return text

    def _push_each(self, ids: tuple[int, ...], delta: Delta) -> str:
        """Token by token: each needs its place in the text, or may be the one that completes a stop string."""
        shown = []
        for i, token in enumerate(ids):
            self.token_count += 1
            if self._waiting is not None and i < len(delta.logprobs):
                self._waiting.append(ShownToken(delta.logprobs[i], self._made))
            text = self._detokenizer.push((token,))
            self._made += len(text)
            shown.append(self._find(text))
            if self.finish is not None:
                break
        return "".join(shown)

    def _find(self, text: str) -> str:
        finder = self._finder
        if finder is None or self.token_count < self._min_tokens:
            return text
        text = finder.push(text)
        if finder.matched is not None:
            self.finish = "stop"
        return text

    def _flush(self) -> str:
        text = self._find(self._detokenizer.flush())
        if self._finder is not None and self.finish is None:
            text += self._finder.flush()
        return text

    def parse(self, text: str) -> Pieces:
        """What the parser makes of new text, and where the choice is over, of the rest."""
        assert self.parser is not None, "a choice whose text is content has no parts"
        pieces = self.parser.push(text)
        if self.is_over():
            pieces += self.parser.flush()
        for piece in pieces:
            if isinstance(piece, CallBegins):
                self.calls = True
            elif isinstance(piece, Reasoning):
                self.reasoning_tokens = self.token_count
        return pieces

    @property
    def reason(self) -> str:
        """`finish` as clients are told it."""
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish or ""

    def take_tokens(self) -> list[ShownToken] | None:
        """Tokens whose text has begun to show since the last call; None when nobody asked for log-probabilities."""
        if self._waiting is None:
            return None
        done = self.finish is not None
        cut_by_string = self._finder is not None and self._finder.matched is not None
        count = 0
        for token in self._waiting:
            if token.offset >= self.characters and (not done or cut_by_string):
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [ShownToken(t.logprobs, t.offset + self._offset) for t in taken]


class IdsChoice(Choice):
    """A choice whose ids are shown as they come."""

    def __init__(self, index: int, detokenizer: Detokenizer, **how: Any) -> None:
        super().__init__(index, detokenizer, **how)
        self._ids: list[int] = []

    def push(self, delta: Delta) -> str:
        """See `Choice`."""
        before = self.token_count
        text = super().push(delta)
        self._ids += delta.token_ids[: self.token_count - before]
        return text

    def take_ids(self) -> list[int]:
        """What it emitted since the last call, all that was counted and no more."""
        taken, self._ids = self._ids, []
        return taken
