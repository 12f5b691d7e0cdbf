"""Prompts that ask for what stands between two texts, in the form that a model was trained on (fill in the middle).

Which form is read off the vocabulary: a model that knows one has tokens of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.text.chat_form import INFILLING


@dataclass(frozen=True, slots=True)
class Infilling:
    """The tokens before the prefix, between it and the suffix, and after both; and `stop`, which ends the answer."""

    begin: int
    between: int
    end: int
    stop: int | None

    def prompt(self, lead: Sequence[int], prefix: Sequence[int], suffix: Sequence[int]) -> tuple[int, ...]:
        """Ids of the whole prompt; `lead` is what the tokenizer puts before any."""
        return (*lead, self.begin, *prefix, self.between, *suffix, self.end)


def find_infilling(id_of: Callable[[str], int | None]) -> Infilling | None:
    """The form whose tokens the vocabulary has; None: it has none."""
    for names in INFILLING:
        begin, between, end, stop = map(id_of, names)
        if begin is not None and between is not None and end is not None:
            return Infilling(begin, between, end, stop)
    return None
