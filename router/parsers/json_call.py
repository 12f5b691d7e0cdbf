"""One JSON value in a stream of text: where it ends, and for an object that is a call its name and arguments as they
come.
"""

from __future__ import annotations

import json

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters", "args")


class JsonValue:
    """The extent of an object that begins with the first character pushed."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        """Takes what belongs to the object, see `done`; returns what does not."""
        for at, c in enumerate(text):
            if self.done:
                return text[at:]
            self.text += c
            self.see(c)
        return ""

    def see(self, c: str) -> None:
        """The next character."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
        elif c == '"':
            self._in_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            self.done = self._depth == 0


class JsonCall(JsonValue):
    """`{"name": ..., "arguments": {...}}`, in either order. `name` is None until it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.has_arguments = False
        self._key: str | None = None
        self._token = ""  # a string, or another value, at the top level
        self._taken = ""  # arguments that nobody has taken
        self._in_value = False

    def take_arguments(self) -> str:
        """Those that came since the last call."""
        taken, self._taken = self._taken, ""
        return taken

    def see(self, c: str) -> None:
        """The next character."""
        depth, was_in_string = self._depth, self._in_string
        super().see(c)
        if self._in_value:
            self._see_value(c, depth, was_in_string)
        elif depth == 1:
            if was_in_string or c == '"':
                self._token = c if not was_in_string else self._token + c
            elif c == ":":
                self._key, self._token, self._in_value = _string(self._token), "", True

    def _see_value(self, c: str, depth: int, was_in_string: bool) -> None:
        ends = not was_in_string and depth == 1 and c in ",}"
        if not ends and (self._token or not c.isspace()):
            self._token += c
            if self._key in _ARGUMENTS and self._token[0] in "{[" and (depth > 1 or not c.isspace()):
                self.has_arguments = True
                self._taken += c
        if ends:
            value = self._token.strip()
            if self._key in _NAMES and value.startswith('"'):
                self.name = _string(value)
            elif self._key in _ARGUMENTS and value[:1] not in "{[":  # JSON in a string, as some models write it
                self.has_arguments = True
                self._taken += (_string(value) or "") if value.startswith('"') else "{}"
            self._key, self._token, self._in_value = None, "", False


def _string(token: str) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
