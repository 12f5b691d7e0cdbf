"""What an answer's text turns out to be, piece by piece, and who says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the thoughts before it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """Tool call number `index` is known by name; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of call `index`, JSON, go on."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegins | Arguments
Pieces = list[Piece]


class Parser(Protocol):
    """One answer's. But for their borders, its pieces do not depend on how the text is cut into pushes."""

    def push(self, text: str) -> Pieces:
        """What is certain by now."""

    def flush(self) -> Pieces:
        """The rest, once no more text comes."""


class Plain:
    """All is content."""

    def push(self, text: str) -> Pieces:
        """All of it."""
        return [Content(text)] if text else []

    def flush(self) -> Pieces:
        """Nothing is held."""
        return []


@dataclass(slots=True)
class ParsedCall:
    """A whole tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedMessage:
    """A whole answer; `content` is None where there are calls and no text."""

    text: str = ""
    reasoning: str = ""
    calls: list[ParsedCall] = field(default_factory=list)

    def add(self, pieces: Sequence[Piece]) -> None:
        """`pieces` come next."""
        for piece in pieces:
            if isinstance(piece, Content):
                self.text += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning += piece.text
            elif isinstance(piece, CallBegins):
                self.calls.append(ParsedCall(piece.id, piece.name))
            else:
                self.calls[piece.index].arguments += piece.text

    @property
    def content(self) -> str | None:
        """The answer's own text."""
        return None if self.calls and not self.text.strip() else self.text


def held_back(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for count in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:count]):
            return count
    return 0
