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
class Block:
    """A run of pieces of one kind: text, thoughts, or one call (its arguments are what it says). `first` began it."""

    first: Content | Reasoning | CallBegins
    said: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that it says so far."""
        return "".join(self.said)


@dataclass(slots=True)
class ParsedMessage:
    """An answer, as far as it has come; `content` is None where there are calls and no text."""

    blocks: list[Block] = field(default_factory=list)  # in the order in which the model wrote them

    def add(self, pieces: Sequence[Piece]) -> None:
        """`pieces` come next."""
        for piece in pieces:
            self.take(piece)

    def take(self, piece: Piece) -> bool:
        """`piece` comes next; whether a block begins with it. Arguments are those of the call begun last."""
        blocks = self.blocks
        if isinstance(piece, CallBegins):
            blocks.append(Block(piece))
            return True
        if isinstance(piece, Arguments) or (blocks and type(blocks[-1].first) is type(piece)):
            blocks[-1].said.append(piece.text)
            return False
        blocks.append(Block(piece, [piece.text]))
        return True

    @property
    def content(self) -> str | None:
        """The answer's own text."""
        text = self._all(Content)
        return None if self.calls and not text.strip() else text

    @property
    def reasoning(self) -> str:
        """The thoughts before it."""
        return self._all(Reasoning)

    @property
    def calls(self) -> list[ParsedCall]:
        """The calls, in order."""
        return [ParsedCall(b.first.id, b.first.name, b.text) for b in self.blocks if isinstance(b.first, CallBegins)]

    def _all(self, kind: type[Content] | type[Reasoning]) -> str:
        return "".join(block.text for block in self.blocks if isinstance(block.first, kind))


def held_back(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for count in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:count]):
            return count
    return 0
