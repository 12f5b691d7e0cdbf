"""Every entry of this device's tuning table against references in fp32, with NaN wherever nothing may be read.

Outputs, workspaces, unused blocks, tails of blocks and what surrounds a weight hold NaN; unused table entries are -1.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tuning_entries import SHAPES, WEIGHTS, HeadShape

from kernels.backend import use_triton
from kernels.linear import gemv
from kernels.paged_decode import decode_workspace_size, paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference
from kernels.tuning import Steps, table_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
PAGE = 16
BOUND = 8192  # as graphs bound every length
LONGEST = 2100  # query tokens
MOST_SEQUENCES = 1024
LENGTHS = (1, 300, 16, 0, 17, 64, 1200, 65, 127, 15, 33, 513, 2, 100)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not use_triton(torch.empty(0, device=DEVICE)), reason="needs a CUDA device"),
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def paged(shape: HeadShape, lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Both caches and the block tables of sequences, scattered among blocks that are nobody's."""
    lens = integers(lengths).long()
    needed = (lens + PAGE - 1) // PAGE
    blocks = int(needed.sum()) + 5
    columns = torch.arange(-(-max(BOUND, *lengths) // PAGE), device=DEVICE)
    used = columns < needed[:, None]
    table = torch.full(used.shape, -1, device=DEVICE, dtype=torch.int32)
    table[used] = torch.randperm(blocks, device=DEVICE, dtype=torch.int32)[: blocks - 5]
    position = torch.arange(max(lengths), device=DEVICE)
    slots = table.long()[:, position // PAGE] * PAGE + position % PAGE
    slots = slots[position < lens[:, None]]
    caches = [torch.full((blocks * PAGE, *shape[1:]), torch.nan, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    for cache in caches:
        cache[slots] = normal(len(slots), *shape[1:])
    return [cache.view(blocks, PAGE, *shape[1:]) for cache in caches], table


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


def at_once(launches: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """What they give, all compiled beside each other."""
    if DEVICE.type == "cpu":  # the interpreter is for one thread
        return [launch() for launch in launches]
    launches[0]()
    with ThreadPoolExecutor(12, initializer=torch.cuda.synchronize) as pool:
        return list(pool.map(lambda launch: launch(), launches))


def of(steps: dict, shape: HeadShape) -> Steps:
    return steps[DTYPE.itemsize, shape.size, shape.heads // shape.kv_heads]


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name):
    """At both ends of every step."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    heads, kv_heads, size = shape
    steps = of(table_of(DEVICE).decode, shape)
    edges = [1, *(-(-bound // kv_heads) + less for bound in steps.bounds for less in (-1, 0))]
    batches = sorted({batch for batch in edges if 1 <= batch <= MOST_SEQUENCES})
    reached = {steps.at(batch * kv_heads) for batch in batches}
    least = {steps.at(batch * kv_heads) for batch in range(1, MOST_SEQUENCES + 1)}
    assert reached == least
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(max(batches))]
    caches, table = paged(shape, lengths)
    lens, exact = integers(lengths), [cache.float() for cache in caches]
    q = normal(len(lengths), heads, size)
    expected = paged_decode_reference(q.float(), *exact, table, lens, size**-0.5)

    def launch(part: slice, bound: int) -> torch.Tensor:
        out = torch.full_like(q[part], torch.nan)
        workspace = torch.full((decode_workspace_size(q[part], kv_heads, bound),), torch.nan, device=DEVICE)
        rest = (table[part], lens[part], bound, size**-0.5)
        return paged_decode(q[part], *caches, *rest, out=out, workspace=workspace)

    # Other lengths for small batches.
    parts = [slice(first, first + batch) for batch in batches for first in (0, len(lengths) - batch)]
    runs = [(part, bound) for part in parts for bound in (BOUND, max(1, *lengths[part]))]
    for (part, _), out in zip(runs, at_once([partial(launch, *run) for run in runs]), strict=True):
        same(out, expected[part])


@pytest.mark.parametrize("name", SHAPES)
def test_prefill(name):
    """At the least and the greatest number of query tokens of every step, between sequences of fewer."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    heads, _, size = shape
    steps = of(table_of(DEVICE).prefill, shape)
    batches = []
    for most in sorted({1, *(bound + less for bound in steps.bounds for less in (-1, 0)), LONGEST}):
        counts = [most, 1, most // 2 + 1, min(5, most), 0]
        lengths = [most, 40, most // 2 + 778, min(5, most), 0]
        caches, table = paged(shape, lengths)
        starts = integers([0, *counts]).cumsum(0, dtype=torch.int32)
        batches.append((most, normal(sum(counts), heads, size), caches, (table, starts, integers(lengths))))

    def launch(most: int, q: torch.Tensor, caches: list[torch.Tensor], rest: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return paged_prefill(q, *caches, *rest, most, BOUND, size**-0.5, out=torch.full_like(q, torch.nan))

    for (_, q, caches, rest), out in zip(batches, at_once([partial(launch, *one) for one in batches]), strict=True):
        exact = [cache.float() for cache in caches]
        same(out, paged_prefill_reference(q.float(), *exact, *rest, size**-0.5))


@pytest.mark.parametrize(("outputs", "inputs"), WEIGHTS)
@pytest.mark.parametrize("biased", [False, True])
def test_gemv(outputs, inputs, biased):
    torch.manual_seed(0)
    whole = torch.full((outputs, inputs + 8), torch.nan, device=DEVICE, dtype=DTYPE)
    whole[:, :inputs] = normal(outputs, inputs)
    weight, x, bias = whole[:, :inputs], normal(1, inputs), normal(outputs) if biased else None
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        got = gemv(x, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    torch.testing.assert_close(got.float(), expected, atol=2e-3 * inputs**0.5, rtol=1e-2)
