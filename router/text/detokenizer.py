"""Token ids of one answer to text, piece by piece.

The pieces joined are exactly what `Tokenizer.decode` gives for all ids, and no piece shows U+FFFD for a character whose
bytes are still on their way. Two ways, chosen by the tokenizer's decoder:

- byte-level BPE: a token is a string of bytes, whatever stands beside it; an incremental UTF-8 decoder does the rest;
- others (SentencePiece with byte fallback, WordPiece, ...): a token's text depends on its left neighbour, so the tokens
  of the last piece stay as context. A run of byte tokens is one unit there (invalid as a whole or not at all), and is
  held until it ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """The text side of one answer."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that `token_ids` complete; amortised O(1) a token."""

    def flush(self) -> str:
        """The rest, once no more tokens come: bytes that never became a character are U+FFFD."""


class TokenTexts(dict[int, str | None]):
    """The text of every token whose bytes are whole characters, None of the others; `skipped` tokens have "".

    All answers of a tokenizer share one: after a while most tokens cost a look-up.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: Collection[int]) -> None:
        super().__init__(dict.fromkeys(skipped, ""))
        self.token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = False  # inside a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that `token_ids` complete."""
        texts = self._texts
        if not self._open:
            if len(token_ids) == 1:  # nearly always
                alone = texts[token_ids[0]]
                if alone is not None:
                    return alone
            else:
                pieces = [texts[i] for i in token_ids]
                if None not in pieces:
                    return "".join(pieces)  # type: ignore[arg-type]  # not one is None
        text = self._utf8.decode(b"".join([b"" if texts[i] == "" else texts.token_bytes(i) for i in token_ids]))
        self._open = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """The rest; bytes of an unfinished character become U+FFFD."""
        self._open = False
        return self._utf8.decode(b"", True)


class ContextDetokenizer:
    """For all other tokenizers. `decode` turns ids into text, `is_byte` says which tokens stand for single bytes."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_byte: Callable[[int], bool],
        skipped: Collection[int],
    ) -> None:
        self._decode, self._is_byte, self._skipped = decode, is_byte, skipped
        self._context: list[int] = []  # tokens whose text is out
        self._context_text = ""
        self._pending: list[int] = []  # tokens whose text is not

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that `token_ids` complete."""
        pieces = []
        for i in token_ids:
            if i in self._skipped:
                continue
            if self._pending and not self._is_byte(i):
                pieces.append(self._take())  # the run of bytes has ended
            self._pending.append(i)
            if not self._is_byte(i):
                pieces.append(self._take())
        return "".join(pieces)

    def flush(self) -> str:
        """The rest."""
        return self._take() if self._pending else ""

    def _take(self) -> str:
        text = self._decode(self._context + self._pending)
        piece = text[len(self._context_text) :]
        # The next token needs a neighbour that shows as text, or it would be decoded as the first of all. What shows
        # nothing (the space that a text begins with) has been that first one, and stays.
        alone = self._decode(self._pending) if piece else ""
        if alone:
            self._context, self._context_text = self._pending, alone
        else:
            self._context, self._context_text = self._context + self._pending, text
        self._pending = []
        return piece
