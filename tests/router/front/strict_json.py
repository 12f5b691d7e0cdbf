"""A second opinion on request bodies: what RFC 8259 and our caps allow, by a grammar of its own.

It shares nothing with `router.protocol.json_entry` but the caps, which it takes from the documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEEPEST, LONGEST_INTEGER, LONGEST_NUMBER, LONGEST_KEY = 64, 20, 512, 1024
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+)"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LONG = re.compile(rf"(?<![.0-9])[0-9]{{{LONGEST_INTEGER + 1}}}")
_SHORT = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")


class _Wrong(Exception):
    pass


@dataclass(frozen=True)
class Verdict:
    """`is_object`: the body is a JSON object that we take; `long_key`: one is refused by its length, as a parameter."""

    is_object: bool
    long_key: bool


def judge(body: bytes) -> Verdict:
    """What a body is."""
    reader = _Reader(body)
    try:
        reader.document()
    except (_Wrong, UnicodeDecodeError):
        return Verdict(False, reader.long_key)
    return Verdict(True, reader.long_key)


class _Reader:
    def __init__(self, body: bytes) -> None:
        self._body, self._text, self._at = body, "", 0
        self.long_key = self._lone = False  # a lone surrogate: the rest is read all the same

    def document(self) -> None:
        self._text = self._body.decode("utf-8")
        self._space()
        if self._text[self._at : self._at + 1] != "{":
            raise _Wrong
        self._value(1)
        if self._lone or self._at != len(self._text):
            raise _Wrong

    def _value(self, depth: int) -> None:
        opened = self._text[self._at : self._at + 1]
        if opened and opened in "[{":
            if depth > DEEPEST:
                raise _Wrong
            self._at += 1
            self._inside("]" if opened == "[" else "}", depth, keys=opened == "{")
        elif opened == '"':
            self._string()
        elif number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            text = number[0]
            if _LONG.search(text) or len(text) > LONGEST_NUMBER or abs(float(text)) == float("inf"):
                raise _Wrong
        else:
            word = next((w for w in ("true", "false", "null") if self._text.startswith(w, self._at)), None)
            if word is None:
                raise _Wrong
            self._at += len(word)
        self._space()

    def _inside(self, end: str, depth: int, *, keys: bool) -> None:
        seen: set[str] = set()
        self._space()
        if self._takes(end):
            return
        while True:
            if keys:
                key = self._string()
                self.long_key |= len(key) > LONGEST_KEY
                if key in seen:
                    raise _Wrong
                seen.add(key)
                self._space()
                if not self._takes(":"):
                    raise _Wrong
            self._value(depth + 1)
            if self._takes(end):
                return
            if not self._takes(","):
                raise _Wrong

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        if found is None:
            raise _Wrong
        self._at = found.end()
        units = _ESCAPE.sub(_unescaped, found[1])
        try:
            return units.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._lone = True
            return units

    def _takes(self, one: str) -> bool:
        if self._text[self._at : self._at + 1] != one:
            return False
        self._at += 1
        self._space()
        return True

    def _space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found
        self._at = found.end()


def _unescaped(escape: re.Match[str]) -> str:
    what = escape[1]
    return chr(int(what[1:], 16)) if what[0] == "u" else _SHORT[what]
