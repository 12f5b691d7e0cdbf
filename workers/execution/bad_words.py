"""Sequences of tokens that are never emitted: where all but the last stand at an answer's end, the last is masked.

The host knows the lengths, so it names the words that could end now; what the answer ends in only the device knows.

Shapes: N words that could end, P tokens before the last of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workers.execution.upload import Array

_NOTHING = -1  # no token has this id


@dataclass(frozen=True, slots=True)
class BadWords:
    """All int64: rows, slots, positions of the tokens to draw and last ids [N]; `before` [N, P], the nearest first, -1
    where a word has no more tokens.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    before: torch.Tensor


class WordList:
    """The words of one sequence, as arrays."""

    def __init__(self, words: tuple[tuple[int, ...], ...], vocab_size: int) -> None:
        """Words with ids outside of the vocabulary cannot be emitted, and are left out."""
        words = tuple(w for w in words if min(w) >= 0 and max(w) < vocab_size)
        self.lengths = np.array([len(w) - 1 for w in words], np.int64)
        self.last = np.array([w[-1] for w in words], np.int64)
        self.before = np.full((len(words), int(self.lengths.max(initial=0))), _NOTHING, np.int64)
        for i, word in enumerate(words):
            self.before[i, : len(word) - 1] = word[-2::-1]

    def ending(self, emitted: int) -> Array:
        """Indices of the words that fit into `emitted` tokens and one more."""
        return np.flatnonzero(self.lengths <= emitted)


def gather(rows: list[tuple[int, int, int, int, WordList]]) -> list[Array] | None:
    """Arrays of `BadWords`, in its order, of rows (row, slot, position, tokens emitted, words)."""
    chosen = [(row, slot, position, words, words.ending(emitted)) for row, slot, position, emitted, words in rows]
    chosen = [one for one in chosen if len(one[4])]
    if not chosen:
        return None
    counts = [len(index) for *_, index in chosen]
    width = max(words.before.shape[1] for _, _, _, words, _ in chosen)
    before = [
        np.pad(words.before[index], ((0, 0), (0, width - words.before.shape[1])), constant_values=_NOTHING)
        for _, _, _, words, index in chosen
    ]
    return [
        *(np.repeat(np.array([one[i] for one in chosen], np.int64), counts) for i in range(3)),
        np.concatenate([words.last[index] for _, _, _, words, index in chosen]),
        np.concatenate(before),
    ]


def mask_bad_words(work: torch.Tensor, b: BadWords, token_table: torch.Tensor) -> None:
    """Set the logits of tokens that would complete a word to -inf, in `work` [E, V] itself."""
    back = torch.arange(1, b.before.shape[1] + 1, device=work.device)
    at = (b.positions.unsqueeze(1) - back).clamp_(min=0)
    stands = (token_table[b.slots.unsqueeze(1), at] == b.before) | (b.before < 0)
    change = torch.where(stands.all(dim=1), -torch.inf, 0.0).to(work.dtype)
    work.index_put_((b.rows, b.last), change, accumulate=True)
