"""Log-probabilities of prompts' tokens: of rows of a step that draw nothing themselves.

Shapes: T tokens, n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workers.api.request import TokenLogprobs
from workers.engine.plan import PromptLogprobs
from workers.execution.sampler import Logprobs, score
from workers.execution.sampling_state import PromptRows

SCORED_ROWS = 256  # of logits that exist at a time

Bring = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of some rows of one sequence, on the host or on their way to it. tokens [n] int64."""

    slot: int
    start: int
    tokens: torch.Tensor
    logprobs: Logprobs

    def read(self) -> PromptLogprobs:
        """As the engine takes them."""
        p, tokens = self.logprobs, self.tokens.tolist()
        top = [tuple(zip(*both, strict=True)) for both in zip(p.top_ids.tolist(), p.top.tolist(), strict=True)]
        values = zip(tokens, p.chosen.tolist(), p.rank.tolist(), top, strict=True)
        return PromptLogprobs(self.slot, self.start, tuple(TokenLogprobs(*one) for one in values))


def pieces_of(wanted: Sequence[PromptRows]) -> list[int]:
    """How many rows `score_prompts` computes logits of at a time."""
    return [min(SCORED_ROWS, rows.count - done) for rows in wanted for done in range(0, rows.count, SCORED_ROWS)]


def score_prompts(
    hidden: torch.Tensor,
    wanted: Sequence[PromptRows],
    token_table: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    bring: Bring,
) -> list[PromptScores]:
    """hidden [T, C] of a step and what is wanted of it; token_table [slots, L]. `bring` starts a copy to the host.

    With several ranks all compute the logits, since the vocabulary is cut over them.
    """
    found = []
    for rows in wanted:
        for done in range(0, rows.count, SCORED_ROWS):
            count = min(SCORED_ROWS, rows.count - done)
            start = rows.start + done
            tokens = token_table[rows.slot, start : start + count].long()
            logits = compute_logits(hidden[rows.first + done : rows.first + done + count])
            p = score(logits, tokens, rows.top)
            logprobs = Logprobs(*map(bring, (p.chosen, p.rank, p.top, p.top_ids)))
            found.append(PromptScores(rows.slot, start, bring(tokens), logprobs))
    return found
