"""One sequence in its grammar: where it is, and what it has come to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from workers.api.grammar import GrammarSpec
from workers.engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_NOT_ALLOWED = "the grammar does not allow what was emitted"


class GrammarState:
    """One sequence in its grammar. `count`: tokens of the answer that it has seen; `left`: how many more it may have.

    `error`: why no mask can be computed any more; None while all is well. `job`: its next mask, under way or there, if
    that was begun; until it is taken nobody else may touch the state. `is_slow`: whether the next one
    will probably take long.
    """

    def __init__(
        self,
        spec: GrammarSpec,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        stop_ids: Collection[int],
        min_tokens: int,
        max_tokens: int,
    ) -> None:
        self.spec, self.matcher, self.min_tokens = spec, matcher, min_tokens
        self.stop_ids = tuple(i for i in stop_ids)
        self.count = 0
        self.error: str | None = None
        self.job: Future[dict[GrammarState, bytes]] | None = None
        self.is_slow = False
        self._most = 0  # tokens that a mask allowed
        self._max_tokens = max_tokens
        self._tokenizer, self._at_beginning = vocabulary.tokens, vocabulary.at_beginning
        self._marker = spec.begins_after.encode()
        self._before: bytes | None = b"" if self._marker else None  # the end of what came so far; None: it has begun

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self._max_tokens - self.count

    @property
    def has_begun(self) -> bool:
        """Whether the answer is where the grammar holds."""
        return self._before is None

    def follow(self, new: Sequence[int]) -> None:
        """The answer goes on with `new`."""
        is_first = self.begins
        self.count += len(new)
        for i, token in enumerate(new):
            if self._before is None:
                self._consume(list(new[i:]), is_first=is_first)
                break
            self._look_for_begin(token)

    @property
    def begins(self) -> bool:
        """Whether the grammar holds for the next token, and the answer's text begins with it."""
        return self._before is None and not self.count

    def guess(self, allowed: int, few: float) -> None:
        """How the next mask will be, after one of so many tokens: in a string that has room for some tokens only, each
        is looked at by itself.
        """
        self.is_slow = few < allowed < self._most
        self._most = max(self._most, allowed)

    def fail(self) -> None:
        """Nothing can be computed any more: the matcher says why."""
        self.error = self.matcher.get_error() or _NOT_ALLOWED

    def before(self, size: int) -> bytes:
        """The mask, of `size` bytes, ahead of the grammar: all but the stop ids."""
        row = bytearray(b"\xff") * size
        for token in self.stop_ids:
            if token >> 3 < size:
                row[token >> 3] &= ~(1 << (token & 7)) & 0xFF
        return bytes(row)

    def _look_for_begin(self, token: int) -> None:
        assert self._before is not None
        text = self._before + self._tokenizer.decode_bytes([token])
        at = text.find(self._marker)
        if at < 0:
            self._before = text[1 - len(self._marker) :] if len(self._marker) > 1 else b""
            return
        self._before = None
        rest = text[at + len(self._marker) :].lstrip()
        if rest:  # the token had more in it
            self._consume(self._tokenizer.tokenize_bytes(rest))

    def _consume(self, tokens: list[int], *, is_first: bool = False) -> None:
        if self.error is not None:
            return
        if is_first and tokens[0] in self._at_beginning:
            same = self._at_beginning[tokens[0]]
            if same is None:
                self.error = _NOT_ALLOWED
                return
            tokens[:1] = same
        if not self.matcher.consume_tokens(tokens):
            self.fail()
