"""Special strings in a user's text are data: they are hidden from the template, and encoded as plain text.

Before templating, each special string in the conversation is replaced by a mark that nobody can guess. What the
template then writes itself is structure. The result is encoded by a twin of the tokenizer whose special tokens have
secret names: structure is renamed to them, marks become the literal strings again, and since those name nothing in the
twin, they are split like any other text, in their true surroundings.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tokenizers

from router.text.encoding import ids_of
from router.text.templates import Conversation

_OPEN, _CLOSE, _SECRET = "\ue0a0", "\ue0a1", "\ue0a2"  # private use: no template or case filter touches them
_PIECE = 1 << 16  # characters searched at a time: the search holds the interpreter


class LiteralSpecials:
    """Marks and encodes the special strings of one tokenizer. Thread-safe after `warm` (or its first `encode`)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, nonce: str | None = None) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        # Two: a template that cuts a mark short shows a part of the first, and must not tell how to forge a special.
        self._nonce = nonce or str(secrets.randbits(64))
        self._secret_nonce = secrets.token_hex(8)
        self._specials = sorted((t.content for t in added.values() if t.special and t.content), key=len, reverse=True)
        self._index = {s: k for k, s in enumerate(self._specials)}
        self._real_id = {t.content: i for i, t in added.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._specials)) or "(?!)")
        self._longest = max(map(len, self._specials), default=0)
        self._marks = re.compile(f"{_OPEN}{self._nonce}{_OPEN}(\\d+){_CLOSE}")
        self._twin: tokenizers.Tokenizer | None = None
        self._back: dict[int, int] = {}
        # A token matched after normalization can be written in ways that the pattern does not see.
        self._always = tokenizer.normalizer is not None and any(t.special and t.normalized for t in added.values())

    def hide(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """The conversation with marks for special strings, and whether its prompt must go through `encode`."""
        if not any(self._has_special(s) for s in strings(said_in(conversation))):
            return conversation, self._always
        messages = [{k: v if k == "role" else self._hidden(v) for k, v in m.items()} for m in conversation.messages]
        others = {name: self._hidden(getattr(conversation, name)) for name in ("tools", "variables", "documents")}
        return replace(conversation, messages=messages, **others), True

    def show(self, text: str) -> str:
        """The marks of `text` replaced by the special strings again."""
        return self._marks.sub(lambda m: self._specials[int(m[1])], text)

    def encode(self, rendered: str, *, limit: int | None = None, noun: str = "messages") -> list[int]:
        """Ids of a text with marks: its own special strings are special, the marked ones plain. See `ids_of`."""
        twin = self._twin or self.warm()
        structure = self.show(self._replaced(rendered, self._secret))
        back = self._back
        ids = ids_of(twin, structure, add_special_tokens=False, limit=limit, noun=noun)
        return [back.get(i, i) for i in ids]

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._replaced(value, self._mark) if self._has_special(value) else value
        if isinstance(value, Mapping):
            return {self._hidden(k): self._hidden(v) for k, v in value.items()}
        return [self._hidden(v) for v in value] if isinstance(value, list | tuple) else value

    def _has_special(self, text: str) -> bool:
        if len(text) <= _PIECE:
            return self._pattern.search(text) is not None
        return next(self._found(text), None) is not None

    def _found(self, text: str) -> Iterator[re.Match[str]]:
        """What `finditer` gives, by searches that are each short."""
        search, at, size = self._pattern.search, 0, len(text)
        while at < size:
            end = at + _PIECE
            match = search(text, at, end + self._longest)
            if match is None or match.start() >= end:  # from `end` on a longer one could be cut off
                at = end
            else:
                yield match
                at = match.end()

    def _replaced(self, text: str, by: Callable[[str], str]) -> str:
        parts: list[str] = []
        at = 0
        for match in self._found(text):
            parts += text[at : match.start()], by(match[0])
            at = match.end()
        return "".join([*parts, text[at:]]) if parts else text

    def _mark(self, special: str) -> str:
        return f"{_OPEN}{self._nonce}{_OPEN}{self._index[special]}{_CLOSE}"

    def _secret(self, special: str) -> str:
        return f"{_SECRET}{self._secret_nonce}{_SECRET}{self._index[special]}{_SECRET}"

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


def said_in(conversation: Conversation) -> tuple[Any, ...]:
    """Whatever of it came from the client."""
    return conversation.messages, conversation.tools, conversation.variables, conversation.documents


def strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield k
            yield from strings(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from strings(v)


def _merge_parts(merge: str | list[str]) -> Sequence[str]:
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    return (*parts, "".join(parts))
