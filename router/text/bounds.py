"""How many tokens a text has at least, without tokenizing it: a hostile length must cost next to nothing.

Where no byte of a text is lost on its way into tokens, a text with b bytes of one kind (letters, spaces, ...) has at
least b / m tokens, m being the most bytes of that kind in any one token. The kinds matter: in many vocabularies the
longest token is a run of a hundred spaces, which says little about words.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

import tokenizers

from router.text.token_bytes import TokenBytes

_LETTERS = bytes([*range(0x41, 0x5B), *range(0x61, 0x7B)])
_SPACES = b"\t\n\x0b\x0c\r "
_DIGITS = b"0123456789"
_OTHER_ASCII = bytes(b for b in range(0x80) if b not in _LETTERS + _SPACES + _DIGITS)
_LINES = b"\xe2"  # leads punctuation and box drawing, of which there are long tokens
_LEADS = bytes([*range(0xC2, 0xE2), *range(0xE3, 0xF5)])  # one for each other character beyond ASCII
_KINDS = (_LETTERS, _SPACES, _DIGITS, _OTHER_ASCII, _LINES, _LEADS)
_NOT_KINDS = tuple(bytes(b for b in range(256) if b not in kind) for kind in _KINDS)
_UNBOUNDED = 1 << 60

_PIECE = 1 << 14  # characters counted at a time: counting holds the interpreter
_SEAM = 16  # bytes by which a text that is normalized in pieces may differ at each seam
_UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
LONG_RUN = 4096  # characters; longer words cost a tokenizer more for each character, the longer the more
MOST_IN_LONG_RUNS = 1 << 20  # characters of one text: about a second, where as many in short words take a third of it
_RUN = re.compile(rf"\w{{{LONG_RUN + 1}}}|\s{{{LONG_RUN + 1}}}|[^\w\s]{{{LONG_RUN + 1}}}")
_RUN_ENDS = {"w": re.compile(r"\W"), "s": re.compile(r"\S"), "o": re.compile(r"[\w\s]")}
_SPLITTING = frozenset({"ByteLevel", "Split", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation"})
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})  # pre-tokenizers that drop nothing


class TokenBound:
    """The lower bound for one tokenizer. Thread-safe; the first long text costs a pass over the vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer, token_bytes: TokenBytes) -> None:
        self._backend, self._bytes = backend, token_bytes

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` has more than `limit` tokens for certain. Reads no further than it must."""
        if len(text) <= limit or (most := self._most) is None:
            return False
        counts = [0] * len(_KINDS)
        for at in range(0, len(text), _PIECE):
            data = self._normalized(text[at : at + _PIECE]).encode("utf-8", "replace")
            for k, others in enumerate(_NOT_KINDS):
                counts[k] += len(data.translate(None, others)) - _SEAM
                if counts[k] > limit * most[k]:
                    return True
        return False

    def too_slow(self, text: str) -> bool:
        """Whether `text` would keep a tokenizer busy for long: too much of it stands in words that never end.

        A pre-tokenizer's word is merged as a whole, at a cost that grows faster than its length; without a
        pre-tokenizer that splits, the text is one word. Holds the interpreter for a millisecond at a time at most.
        """
        if len(text) <= MOST_IN_LONG_RUNS:
            return False
        if not self._splits:
            return True
        in_runs = at = 0
        while at < len(text):
            found = _RUN.search(text, at, at + _PIECE)
            if found is None:
                at += _PIECE - LONG_RUN  # one that begins behind would not end before the seam
                continue
            end = self._run_end(text, found)
            in_runs += end - found.start()
            if in_runs > MOST_IN_LONG_RUNS:
                return True
            at = end
        return False

    @staticmethod
    def _run_end(text: str, found: re.Match[str]) -> int:
        first = found[0][0]
        other = _RUN_ENDS["s" if first.isspace() else "w" if first.isalnum() or first == "_" else "o"]
        at = found.end()
        while at < len(text):
            end = other.search(text, at, at + _PIECE)
            if end is not None:
                return end.start()
            at += _PIECE
        return len(text)

    @cached_property
    def _splits(self) -> bool:
        before = self._spec["pre_tokenizer"]
        steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before] if before else []
        return any(s["type"] in _SPLITTING and s.get("use_regex", True) for s in steps)

    def _normalized(self, piece: str) -> str:
        normalizer = self._backend.normalizer
        if normalizer is None or (self._keeps_ascii and piece.isascii()):
            return piece
        normalized: str = normalizer.normalize_str(piece)
        return normalized

    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        return spec

    @cached_property
    def _keeps_ascii(self) -> bool:
        return self._spec["normalizer"]["type"] in _UNICODE_FORMS

    @cached_property
    def _most(self) -> list[int] | None:
        """The most bytes of each kind in one token; None where bytes can get lost (removed, or unknown to it)."""
        spec = self._spec
        model, before = spec["model"], spec["pre_tokenizer"]
        steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before] if before else []
        vocab = self._backend.get_vocab(with_added_tokens=True)
        alphabet = self._bytes.alphabet if self._bytes.is_byte_level else (f"<0x{b:02X}>" for b in range(256))
        if not (
            all(map(vocab.__contains__, alphabet))
            and (self._bytes.is_byte_level or model.get("byte_fallback"))
            and all(s["type"] in _KEEPING or s.get("behavior") not in (None, "Removed") for s in steps)
        ):
            return None
        most = [1] * len(_KINDS)
        for token in vocab:
            shapes = [self._bytes.of_token(token)]
            if not self._bytes.is_byte_level:
                shapes.append(token.encode())  # a space is U+2581 there, and a text may hold that character as well
            for shape in shapes:
                for k, others in enumerate(_NOT_KINDS):
                    if len(shape) > most[k]:
                        most[k] = max(most[k], len(shape.translate(None, others)))
        if any(t["lstrip"] or t["rstrip"] for t in spec["added_tokens"]):
            most[_KINDS.index(_SPACES)] = _UNBOUNDED  # such a token takes all spaces beside it
        return most
