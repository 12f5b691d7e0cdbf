"""A tokenizer as grammars need it: the bytes of each token, inside of a text and at its beginning.

Byte-level BPE shows each token as the same bytes everywhere. SentencePiece's tokenizers write a space as U+2581, bytes
outside the vocabulary as `<0x0A>`, and drop the space that a text begins with. Others (WordPiece) put spaces between
tokens that have none: what a token is then hangs on its neighbours, and a grammar cannot say which may follow.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from workers.api.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_BYTE_LEVEL = "ByteLevel"
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
# Parts of the vocabulary whose masks llguidance has ready where all of them may come: white space, and in strings what
# is no longer than what is left of `maxLength`. It has 10, 30 and any length of itself; with these one mask in twenty
# (of 128k tokens, many near the end of a string) takes over 0.65 ms, else over 1.08.
_SLICES = [
    r"[\x20\x0A\x0D\x09]+", *(f"{_IN_STRING}{{1,{most}}}" for most in (2, 4, 6, 8, 10, 12, 16, 30)), f"{_IN_STRING}+"
]  # fmt: skip
_OF_BYTES = {_BYTE_LEVEL, "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}  # decoders


class Vocabulary:
    """The tokens of `source`, the text of a tokenizer.json, for a model of `vocab_size` ids.

    `tokens` is llguidance's. `at_beginning`: tokens that show otherwise where a text begins, each with the token that
    shows so inside, with none where nothing shows, or with None: there is no such token. Takes seconds for a large
    one. Raises InvalidRequest, or whatever llguidance raises.
    """

    def __init__(self, source: str, vocab_size: int) -> None:
        document = json.loads(source)
        steps = _steps(document.get("decoder"))
        kinds = {step["type"] for step in steps}
        if not steps or kinds - _OF_BYTES:
            named = ", ".join(sorted(kinds - _OF_BYTES)) or "none"
            raise InvalidRequest(f"its tokens do not stand for bytes of the text (decoder: {named})")
        readable = source
        for step in steps:
            if step["type"] == "Metaspace":  # which llguidance does not know
                readable = json.dumps({**document, "decoder": _spaces_and_bytes(step["replacement"])})
        self.tokens = _read(readable, vocab_size)
        self.at_beginning = {} if _BYTE_LEVEL in kinds else _otherwise_at_beginning(source, self.tokens)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [one for part in decoder["decoders"] for one in _steps(part)] if "decoders" in decoder else [decoder]


def _spaces_and_bytes(space: str) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": space}, "content": " "}
    return {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _read(source: str, vocab_size: int) -> LLTokenizer:
    from llguidance import LLTokenizer

    # Which token it takes for the end shows where a grammar accepts; what really ends a request are its stop ids. So it
    # is one of the tokenizer's own special ones, which no grammar's text contains.
    try:
        return LLTokenizer(source, n_vocab=vocab_size, slices=_SLICES)
    except ValueError as e:
        if "too small" not in str(e):
            raise
        return LLTokenizer(source, slices=_SLICES)  # it knows more tokens than the model has


def _otherwise_at_beginning(source: str, tokens: LLTokenizer) -> dict[int, tuple[int, ...] | None]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(source)
    inside = {token: tokens.decode_bytes([token]) for token in range(tokens.vocab_size)}
    same: dict[bytes, tuple[int, ...]] = {
        text: (token,) for token, text in inside.items() if not tokens.is_special_token(token)
    }
    same[b""] = ()
    shown = {token: backend.decode([token]).encode() for token, text in inside.items() if b" " in text}
    return {token: same.get(text) for token, text in shown.items() if text != inside[token]}
