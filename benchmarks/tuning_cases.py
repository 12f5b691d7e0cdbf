"""What `autotune.py` times: launches at the shapes of the tables, over memory that is not in the L2 cache.

Shapes: B sequences, H query heads, K KV heads, D head size, N blocks, S block size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels.linear import gemv
from kernels.paged_decode import paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference

PAGE = 16
COLD_BYTES = 300 << 20  # read by the launches of a case: many times the L2 cache
MOST_LAUNCHES = 128
CONTEXT = 8192  # graphs bound every length by the context


class HeadShape(NamedTuple):
    """Of one rank's attention."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True, slots=True)
class Case:
    """Launches with a tuning, each over other memory; `expected` fp32: how the output of the last begins.

    work: bytes read by a launch, or its operations.
    """

    name: str
    launches: Sequence[Callable[[Any], torch.Tensor]]
    expected: torch.Tensor
    slack: float
    work: float

    def check(self, out: torch.Tensor) -> None:
        """Raises AssertionError where `out`, of the last launch, is wrong."""
        got = out[: len(self.expected)].float()
        torch.testing.assert_close(got, self.expected, atol=self.slack, rtol=2e-2)


class Arena:
    """Memory of keys and values, given the shape that a case wants. `elements` of each."""

    def __init__(self, device: torch.device, elements: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self.random = torch.Generator(device).manual_seed(0)
        self._memory = [self.normal(elements) for _ in range(2)]

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers of the arena's kind."""
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(generator=self.random)

    def caches(self, kv_heads: int, size: int) -> list[torch.Tensor]:
        """Key and value cache [N, S, K, D] of as many blocks as there are."""
        blocks = self._memory[0].numel() // (PAGE * kv_heads * size)
        return [flat[: blocks * PAGE * kv_heads * size].view(blocks, PAGE, kv_heads, size) for flat in self._memory]

    def tables(self, lengths: Sequence[int], blocks: int, bytes_read: float) -> list[torch.Tensor]:
        """Block tables, no block in two of them if that can be, for as many launches as leave the caches cold."""
        needed = torch.tensor([-(-length // PAGE) for length in lengths], device=self.device)
        total = int(needed.sum())
        copies = max(1, min(MOST_LAUNCHES, int(COLD_BYTES // bytes_read) + 1, blocks // total))
        order = torch.randperm(blocks, generator=self.random, device=self.device, dtype=torch.int32)
        columns = torch.arange(-(-int(needed.max()) // 16) * 16, device=self.device)
        used = columns < needed[:, None]
        tables = []
        for i in range(copies):
            table = torch.zeros(used.shape, device=self.device, dtype=torch.int32)
            table[used] = order[i * total : (i + 1) * total]
            tables.append(table)
        return tables

    def integers(self, values: Sequence[int]) -> torch.Tensor:
        """int32 on the device."""
        return torch.tensor(values, device=self.device, dtype=torch.int32)


def lengths_of(batch: int, mean: int, varied: bool) -> list[int]:
    """Alike, or as those of a chat log, so many tokens in the mean."""
    rng = random.Random(batch)
    raw = [rng.lognormvariate(0.0, 0.9) if varied else 1.0 for _ in range(batch)]
    return [min(4000, max(8, round(x * mean * batch / sum(raw)))) for x in raw]


def _exact(caches: list[torch.Tensor], table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both caches in fp32 with nothing but the blocks of `table`, and the table of those."""
    used, renumbered = table.unique(return_inverse=True)
    keys, values = (cache[used.long()].float() for cache in caches)
    return keys, values, renumbered.int()


def decode_case(arena: Arena, shape: HeadShape, batch: int, mean: int, varied: bool) -> Case:
    """Decode attention of `batch` sequences of `mean` tokens."""
    heads, kv_heads, size = shape
    lengths = lengths_of(batch, mean, varied)
    caches, lens = arena.caches(kv_heads, size), arena.integers(lengths)
    work = 2 * sum(lengths) * kv_heads * size * arena.dtype.itemsize
    tables = arena.tables(lengths, len(caches[0]), work)
    q, scale, few = arena.normal(batch, heads, size), size**-0.5, min(4, batch)
    expected = paged_decode_reference(q[:few].float(), *_exact(caches, tables[-1][:few]), lens[:few], scale)

    def launch(table: torch.Tensor, tuning: Any) -> torch.Tensor:
        return paged_decode(q, *caches, table, lens, CONTEXT, scale, tuning=tuning)

    name = f"{batch} x {'about ' if varied else ''}{mean}"
    return Case(name, [partial(launch, table) for table in tables], expected, 2e-2, work)


def prefill_case(arena: Arena, shape: HeadShape, prompts: int, count: int, behind: int = 0, bound: int = 0) -> Case:
    """Prefill attention of `count` tokens of each prompt behind cached ones; bound: the most that the host knows of."""
    heads, kv_heads, size = shape
    length = count + behind
    caches, lens = arena.caches(kv_heads, size), arena.integers([length] * prompts)
    read = 2 * prompts * length * kv_heads * size * arena.dtype.itemsize
    tables = arena.tables([length] * prompts, len(caches[0]), max(read, COLD_BYTES // 8))
    starts = arena.integers([i * count for i in range(prompts + 1)])
    q, scale = arena.normal(prompts * count, heads, size), size**-0.5
    exact = _exact(caches, tables[-1][:1])
    expected = paged_prefill_reference(q[:count].float(), *exact, starts[:2], lens[:1], scale)
    most = max(bound, count)

    def launch(table: torch.Tensor, tuning: Any) -> torch.Tensor:
        return paged_prefill(q, *caches, table, starts, lens, most, CONTEXT, scale, tuning=tuning)

    work = 4 * prompts * heads * size * (count * behind + count * (count + 1) / 2)
    name = f"{prompts} x {count}" + (f" behind {behind}" if behind else "") + (f", bound {bound}" if bound else "")
    return Case(name, [partial(launch, table) for table in tables], expected, 2e-2, work)


def gemv_case(arena: Arena, outputs: int, inputs: int) -> Case:
    """The product for one token."""
    size = outputs * inputs * arena.dtype.itemsize
    weights = [arena.normal(outputs, inputs) for _ in range(max(1, min(16, COLD_BYTES // size)))]
    x = arena.normal(1, inputs)

    def launch(weight: torch.Tensor, tuning: Any) -> torch.Tensor:
        # Without a tuning, by the library.
        return F.linear(x, weight) if tuning is None else gemv(x, weight, tuning=tuning)

    expected = F.linear(x.float(), weights[-1].float())
    return Case(f"{outputs} x {inputs}", [partial(launch, w) for w in weights], expected, 2e-3 * inputs**0.5, size)
