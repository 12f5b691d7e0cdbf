"""How an answer in JSON comes to its end when few tokens are left: of what the grammar allows, what closes most.

Inside a string its end; elsewhere, by preference, brackets that close, commas (more is required), short values. Nothing
that the grammar forbids becomes allowed; where none of these is, all stays allowed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_IN_STRING = re.compile(rb"[a-eg-mo-su-zA-Z]")  # allowed nowhere else: null, true and false begin with other letters
_STRING_ENDS = tuple(map(re.compile, (rb'"[\]}]+', rb'"', rb'",', rb"@")))  # of an address only the name is without end
_ELSEWHERE = tuple(
    map(re.compile, (rb"[\]}]+", rb",|,\"", rb'""[\]}]*', rb'"|:""?', rb"[0-9]", rb"null|true|false|n|t|f"))
)
_ANY = re.compile(b"|".join(pattern.pattern for pattern in (_IN_STRING, *_STRING_ENDS, *_ELSEWHERE)))

Place = tuple[int, int]  # of a token in a mask: byte, and its bit there


class Closers:
    """The tokens of a vocabulary that close, by preference: few. `size` is the number of ids."""

    def __init__(self, tokenizer: LLTokenizer, size: int) -> None:
        texts: dict[int, bytes] = {}
        for token in range(min(size, tokenizer.vocab_size)):
            text = tokenizer.decode_bytes([token])
            if _ANY.fullmatch(text) and not tokenizer.is_special_token(token):
                texts[token] = text
        self._in_string = _tokens_like(_IN_STRING, texts)
        self._string_ends = [_tokens_like(pattern, texts) for pattern in _STRING_ENDS]
        self._elsewhere = [_tokens_like(pattern, texts) for pattern in _ELSEWHERE]

    def narrow(self, row: memoryview) -> None:
        """`row`, a mask of bytes, keeps the best of what it allows."""
        for preferred in self._string_ends if _allowed(row, self._in_string) else self._elsewhere:
            if found := _allowed(row, preferred):
                row[:] = bytes(len(row))
                for at, bit in found:
                    row[at] |= bit
                return


def _tokens_like(pattern: re.Pattern[bytes], texts: dict[int, bytes]) -> list[Place]:
    return [(token >> 3, 1 << (token & 7)) for token, text in texts.items() if pattern.fullmatch(text)]


def _allowed(row: memoryview, places: list[Place]) -> list[Place]:
    return [(at, bit) for at, bit in places if row[at] & bit]
