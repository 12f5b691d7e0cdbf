"""The ways in which the same prompts are run: what differs between them is batching alone, so results must not differ.

Prompts are given whole, also where their last tokens are run one by one as decodes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.api.request import SamplingParams
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan

LENGTHS = (40, 17, 5)  # of the prompts, in tokens
Piece = tuple[int, int, int]  # prompt, first position, tokens


@dataclass(frozen=True, slots=True)
class Scenario:
    """`plans` to run in order; `rows` are the (prompt, position) of their tokens, in order."""

    name: str
    plans: tuple[StepPlan, ...]
    rows: tuple[tuple[int, int], ...]


def prompts(vocab: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Seeded random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()) for n in LENGTHS]


def blocks_needed(block_size: int) -> int:
    """KV blocks that any of the scenarios uses."""
    return sum(-(-n // block_size) for n in LENGTHS) + 1


def scenarios(ids: Sequence[tuple[int, ...]], block_size: int) -> list[Scenario]:
    """alone: one prompt a step. ragged: all in one. paged: scattered blocks, then decodes. chunked: in pieces."""
    long, middle, short = (len(one) for one in ids)
    paged = [[(0, 0, long - 6), (1, 0, middle - 6), (2, 0, short - 4)]]
    paged += [[(0, long - 6 + n, 1), (1, middle - 6 + n, 1), *([(2, short - 4 + n, 1)] if n < 4 else [])]
              for n in range(6)]  # fmt: skip
    third = long // 3
    chunked = [
        [(0, 0, third)],
        [(1, 0, middle // 2), (0, third, third)],
        [(2, 0, short), (0, 2 * third, long - 1 - 2 * third), (1, middle // 2, middle - 1 - middle // 2)],
        [(0, long - 1, 1), (1, middle - 1, 1)],
    ]
    alone = [[(n, 0, len(one))] for n, one in enumerate(ids)]
    ragged = [[(n, 0, len(one)) for n, one in enumerate(ids)]]
    return [
        _scenario("alone", ids, alone, block_size, scattered=False),
        _scenario("ragged batch", ids, ragged, block_size, scattered=False),
        _scenario("paged", ids, paged, block_size, scattered=True),
        _scenario("chunked", ids, chunked, block_size, scattered=True),
    ]


def _scenario(
    name: str, ids: Sequence[tuple[int, ...]], steps: Sequence[Sequence[Piece]], block_size: int, *, scattered: bool
) -> Scenario:
    blocks = _blocks([len(one) for one in ids], block_size, scattered=scattered)
    plans, rows, known = [], [], set[int]()
    for number, pieces in enumerate(steps):
        ordered = sorted(pieces, key=lambda piece: piece[2] > 1)  # decodes first
        new = [n for n, _, _ in ordered if n not in known]
        known |= set(new)
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        added = tuple(NewSequence(n, ids[n], len(ids[n]), greedy, blocks[n]) for n in new)
        plans.append(StepPlan(number + 1, (), added, tuple(ScheduledSequence(n, at, c, 0) for n, at, c in ordered)))
        rows += [(n, at + i) for n, at, count in ordered for i in range(count)]
    return Scenario(name, tuple(plans), tuple(rows))


def _blocks(lengths: Sequence[int], block_size: int, *, scattered: bool) -> list[tuple[int, ...]]:
    """Blocks for each length, in order or dealt out in turn from the end."""
    counts = [-(-n // block_size) for n in lengths]
    if not scattered:
        starts = [sum(counts[:n]) for n in range(len(counts))]
        return [tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
    free, dealt = list(range(sum(counts) + 1)), [list[int]() for _ in counts]
    while any(len(mine) < count for mine, count in zip(dealt, counts, strict=True)):
        for mine, count in zip(dealt, counts, strict=True):
            if len(mine) < count:
                mine.append(free.pop())
    return [tuple(mine) for mine in dealt]
