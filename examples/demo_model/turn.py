"""What one exchange of a training conversation is, and how held-out choices are made."""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of the user and the answer that the model is to learn.

    `literal` marks text whose spelling matters (it is never lower-cased or rephrased). `result` is the number an
    arithmetic turn arrives at, `topic` the fact category, so that a follow-up can refer back to them. `accept` holds
    further answers that count as right when the turn is used for evaluation.
    """

    user: str
    answer: str
    literal: bool = False
    result: int | None = None
    topic: str | None = None
    accept: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Whether the model's `text` is one of the answers of this turn, word for word."""
        return text == self.answer or text in self.accept


def bucket(key: str, count: int) -> int:
    """Map `key` to 0..count-1, the same in every process and release (Python's `hash` is salted)."""
    return zlib.crc32(key.encode()) % count


def is_held_out(key: str, one_in: int = 10) -> bool:
    """Whether `key` belongs to the share of 1/`one_in` that is kept for evaluation and never trained on."""
    return bucket(key, one_in) == 0
