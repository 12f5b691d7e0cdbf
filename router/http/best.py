"""Which of several answers to a prompt are shown (`best_of`): those whose tokens were the most probable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

from router.protocol.answers import ChoiceAnswer


def best(
    answers: Sequence[ChoiceAnswer], made: int, shown: int, *, ranked: bool = False
) -> tuple[list[int], list[ChoiceAnswer]]:
    """Of each prompt's `made` answers the `shown` best, in that order: their indices, and they with new ones.

    Best is the highest mean log-probability of the tokens shown; equals stay in order, an empty answer comes last. Or
    they are `ranked` already.
    """
    kept: list[int] = []
    for start in range(0, len(answers), made):
        order: Iterable[int] = range(start, start + made)
        if not ranked:
            order = sorted(order, key=lambda i: -_mean(answers[i]))
        kept += islice(order, shown)
    return kept, [replace(answers[i], index=index) for index, i in enumerate(kept)]


def _mean(answer: ChoiceAnswer) -> float:
    tokens = answer.tokens or ()
    return sum(t.logprobs.logprob for t in tokens) / len(tokens) if tokens else -math.inf
