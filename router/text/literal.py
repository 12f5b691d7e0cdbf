"""Special strings in a user's text are data: they are hidden from the template, and encoded as plain text.

Before templating, each special string of a content is replaced by a mark that nobody can guess. What the template then
writes itself is structure. The result is encoded by a twin of the tokenizer whose special tokens have secret names:
structure is renamed to them, marks become the literal strings again, and since those name nothing in the twin, they are
split like any other text, in their true surroundings.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence

import tokenizers

_OPEN, _CLOSE, _SECRET = "\ue0a0", "\ue0a1", "\ue0a2"  # private use: no template or case filter touches them


class LiteralSpecials:
    """Marks and encodes the special strings of one tokenizer. Thread-safe after `warm` (or its first `encode`)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, nonce: str | None = None) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._nonce = nonce or str(secrets.randbits(64))
        self._specials = sorted((t.content for t in added.values() if t.special and t.content), key=len, reverse=True)
        self._index = {s: k for k, s in enumerate(self._specials)}
        self._real_id = {t.content: i for i, t in added.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._specials)) or "(?!)")
        self._marks = re.compile(f"{_OPEN}{self._nonce}{_OPEN}(\\d+){_CLOSE}")
        self._twin: tokenizers.Tokenizer | None = None
        self._back: dict[int, int] = {}
        # A token matched after normalization can be written in ways that the pattern does not see.
        self._always = tokenizer.normalizer is not None and any(t.special and t.normalized for t in added.values())

    def needed(self, texts: Sequence[str]) -> bool:
        """Whether any of `texts` holds a special string, so that the prompt must go through `hide` and `encode`."""
        return self._always or any(self._pattern.search(t) for t in texts)

    def hide(self, text: str) -> str:
        """`text` with its special strings replaced by marks."""
        return self._pattern.sub(lambda m: f"{_OPEN}{self._nonce}{_OPEN}{self._index[m[0]]}{_CLOSE}", text)

    def show(self, text: str) -> str:
        """The marks of `text` replaced by the special strings again."""
        return self._marks.sub(lambda m: self._specials[int(m[1])], text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a text with marks: its own special strings are special, the marked ones plain."""
        twin = self._twin or self.warm()
        structure = self._pattern.sub(lambda m: self._secret(m[0]), rendered)
        back = self._back
        return [back.get(i, i) for i in twin.encode(self.show(structure), add_special_tokens=False).ids]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, no special string recognised."""
        return self.encode(self.hide(text))

    def _secret(self, special: str) -> str:
        return f"{_SECRET}{self._nonce}{_SECRET}{self._index[special]}{_SECRET}"

    def warm(self) -> tokenizers.Tokenizer:
        """Build the twin: some tenths of a second for a large vocabulary."""
        spec = json.loads(self._tokenizer.to_str())
        for token in spec["added_tokens"]:
            if token["content"] in self._index:
                token["content"] = self._secret(token["content"])
        # The model must not find the strings either, where its vocabulary lists them as ordinary pieces.
        vocab = spec["model"].get("vocab")
        if isinstance(vocab, dict):
            merged = {part for m in spec["model"].get("merges", []) for part in _merge_parts(m)}
            spec["model"]["vocab"] = {
                (self._secret(k) if k in self._index and k not in merged else k): i for k, i in vocab.items()
            }
        elif isinstance(vocab, list):
            for piece in vocab:
                if piece[0] in self._index:
                    piece[0] = self._secret(piece[0])
        unknown = spec["model"].get("unk_token")
        if unknown in self._index and isinstance(vocab, dict):
            spec["model"]["unk_token"] = self._secret(unknown)
        spec["post_processor"] = None
        twin = tokenizers.Tokenizer.from_str(json.dumps(spec))
        back: dict[int, int] = {}
        for content, real in self._real_id.items():
            twin_id = twin.token_to_id(self._secret(content) if content in self._index else content)
            if twin_id is not None and twin_id != real:
                back[twin_id] = real
        self._back = back
        self._twin = twin
        return twin


def _merge_parts(merge: str | list[str]) -> Sequence[str]:
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    return (*parts, "".join(parts))
