"""The bytes that single tokens stand for."""

from __future__ import annotations

import json

import tokenizers


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet (GPT-2): printable Latin-1 is itself, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


_BYTE_OF = _byte_alphabet()


class TokenBytes:
    """Of one tokenizer. `is_byte_level`: every token stands for its bytes, whatever its neighbours. Thread-safe."""

    alphabet = frozenset(_BYTE_OF)  # a byte-level vocabulary's names of single bytes

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        decoder = json.loads(backend.to_str())["decoder"] if backend.decoder else None
        self.is_byte_level = decoder is not None and decoder["type"] == "ByteLevel"
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        """The bytes of one token by itself; none for ids outside the vocabulary."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self.of_token(self._backend.id_to_token(token_id))
        return known

    def of_token(self, token: str | None) -> bytes:
        """The same of a token as the vocabulary writes it."""
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes([_BYTE_OF[c] for c in token])
            except KeyError:  # an added token in plain characters
                return token.encode()
        if _names_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one of byte fallback's (`<0x0A>`)."""
        token = self._backend.id_to_token(token_id)
        return token is not None and _names_byte(token)


def _names_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
