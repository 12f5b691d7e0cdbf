"""How an answer in JSON comes to its end when few tokens are left: of what the grammar allows, what closes most.

Inside a string its end; elsewhere, by preference, brackets that close, commas (more is required), short values. Nothing
that the grammar forbids becomes allowed; where none of these is, all stays allowed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_IN_STRING = re.compile(rb"[a-eg-mo-su-zA-Z]")  # allowed nowhere else: null, true and false begin with other letters
_STRING_ENDS = tuple(map(re.compile, (rb'"[\]}]+', rb'"', rb'",', rb"@")))  # of an address only the name is without end
_ELSEWHERE = tuple(
    map(re.compile, (rb"[\]}]+", rb",|,\"", rb'""[\]}]*', rb'"|:""?', rb"[0-9]", rb"null|true|false|n|t|f"))
)


class Closers:
    """The tokens of a vocabulary that close, by preference; masks of `size` bits."""

    def __init__(self, tokenizer: LLTokenizer, size: int) -> None:
        texts = {
            token: tokenizer.decode_bytes([token])
            for token in range(min(size, tokenizer.vocab_size))
            if not tokenizer.is_special_token(token)
        }
        self._in_string = _tokens_like(_IN_STRING, texts)
        self._string_ends = [_tokens_like(pattern, texts) for pattern in _STRING_ENDS]
        self._elsewhere = [_tokens_like(pattern, texts) for pattern in _ELSEWHERE]

    def narrow(self, row: bytearray) -> bytes:
        """The best of what `row` allows."""
        allowed = int.from_bytes(row, "little")
        wanted: Sequence[int] = self._string_ends if allowed & self._in_string else self._elsewhere
        for preferred in wanted:
            if found := allowed & preferred:
                return found.to_bytes(len(row), "little")
        return bytes(row)


def _tokens_like(pattern: re.Pattern[bytes], texts: dict[int, bytes]) -> int:
    """As bits."""
    row = bytearray(max(texts, default=0) // 8 + 1)
    for token, text in texts.items():
        if pattern.fullmatch(text):
            row[token >> 3] |= 1 << (token & 7)
    return int.from_bytes(row, "little")
