"""Streams of APIs whose answer is a row of blocks (items, there), of which one is open at a time."""

from __future__ import annotations

from collections.abc import Sequence

from router.parsers.pieces import Block, CallBegins, Content, ParsedMessage, Piece
from router.protocol.answers import ShownToken


class BlockEvents:
    """The part of a `Format` that follows one choice's blocks. Subclasses write the events of a block."""

    def __init__(self) -> None:
        self.message = ParsedMessage()  # as far as it has come

    def begun(self, at: int, block: Block) -> str:
        """Events for block number `at`, of which nothing has been said."""
        raise NotImplementedError

    def more(self, at: int, block: Block, text: str) -> str:
        """Events for what it says next."""
        raise NotImplementedError

    def ended(self, at: int, block: Block, *, cut: bool) -> str:
        """Events for its end; `cut`: the answer was cut in it."""
        raise NotImplementedError

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """See `Format`."""
        return self.parts(index, (Content(text),), tokens)

    def parts(self, index: int, pieces: Sequence[Piece], tokens: Sequence[ShownToken] | None) -> str:
        """See `PartsFormat`."""
        events, blocks = "", self.message.blocks
        for piece in pieces:
            if self.message.take(piece):
                events += self.last_ended(len(blocks) - 2)
                events += self.begun(len(blocks) - 1, blocks[-1])
            if not isinstance(piece, CallBegins) and piece.text:
                events += self.more(len(blocks) - 1, blocks[-1], piece.text)
        return events

    def last_ended(self, at: int, *, cut: bool = False) -> str:
        """Events for the end of block `at`, if there is one of that number."""
        return "" if at < 0 else self.ended(at, self.message.blocks[at], cut=cut)
