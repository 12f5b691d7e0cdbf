"""The batch-invariant kernels: right, and the same to the bit however tokens and spans are put into programs.

That the matrix unit sums alike in tiles of any width, only a GPU can show: see tests/gpu/test_batch_invariance.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import invariant_attention as attention
from kernels import invariant_linear as products
from kernels.attention_tile import PLAIN, ScoreOptions
from kernels.invariant_attention import invariant_attention
from kernels.invariant_linear import Tile, invariant_linear, padded_cost, parts_of, product
from kernels.paged_prefill import paged_prefill_reference

SLACK = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = Tile(64, 16, 4, 2)


@pytest.fixture(autouse=True)
def products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products, which are numpy's: on some processors a row of them depends on where it stands."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a[..., :, :, None].astype(dtype) * b[..., None, :, :].astype(dtype)).sum(axis=-2)

    monkeypatch.setattr(np, "matmul", matmul)


def operands(device, tokens, outputs, inputs, dtype, biased):
    """Operands between NaN, and what they come to in fp64."""
    random = torch.Generator().manual_seed(tokens * outputs + inputs)
    whole = torch.full((outputs, inputs + 24), torch.nan)
    whole[:, :inputs] = torch.randn(outputs, inputs, generator=random)
    wide = torch.full((tokens, inputs + 8), torch.nan)
    wide[:, :inputs] = torch.randn(tokens, inputs, generator=random)
    weight, x = whole.to(device, dtype)[:, :inputs], wide.to(device, dtype)[:, :inputs]
    bias = torch.randn(outputs, generator=random).to(device, dtype) if biased else None
    return x, weight, bias, x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 70, 200), (37, 130, 192), (3, 1, 1)])
def test_product(device, dtype, tokens, outputs, inputs):
    x, weight, bias, expected = operands(device, tokens, outputs, inputs, dtype, biased=tokens > 1)
    got = invariant_linear(x, weight, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=SLACK[dtype] * inputs**0.5, rtol=SLACK[dtype])


@pytest.mark.parametrize("inputs", [256, 250])
def test_parts_give_the_same_in_one_program_and_in_several(device, monkeypatch, inputs):
    monkeypatch.setattr(products, "parts_of", lambda _outputs, _inputs: 4)
    x, weight, bias, expected = operands(device, 5, 70, inputs, torch.float32, biased=True)
    apart = product(x, weight, bias, SMALL)
    together = product(x, weight, bias, Tile(64, 16, 4, 2, apart=False))
    assert torch.equal(apart, together)
    torch.testing.assert_close(apart.double(), expected, atol=2e-4, rtol=1e-5)


def test_the_sum_over_the_inputs_has_the_order_of_its_parts(device, monkeypatch):
    """1 is lost beside 1e8, so what a row comes to tells in which order it was summed."""
    x = torch.ones(3, 256, device=device)
    weight = torch.zeros(2, 256, device=device)
    weight[0, [0, 64, 96]] = torch.tensor([1e8, 1.0, -1e8], device=device)
    weight[1, [0, 128, 160]] = torch.tensor([1e8, -1e8, 1.0], device=device)
    for parts, expected in ((1, [0.0, 1.0]), (2, [0.0, 0.0])):
        monkeypatch.setattr(products, "parts_of", lambda _outputs, _inputs, parts=parts: parts)
        assert product(x, weight).tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_feel_the_others(device, dtype):
    x, weight, bias, _ = operands(device, 20, 70, 192, dtype, biased=True)
    whole = product(x, weight, bias, SMALL)
    for rows in (slice(7, 8), slice(3, 20)):
        assert torch.equal(product(x[rows], weight, bias, SMALL), whole[rows])


def test_how_weights_are_cut():
    """By their shape alone: those of 8B."""
    assert [parts_of(*w) for w in ((6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096))] == [
        *(2, 4, 4, 1, 1)
    ]
    assert [padded_cost(n) for n in (1, 16, 17, 100, 256, 257, 384)] == [16, 16, 32, 128, 256, 384, 384]


def attend(case, rows=None, cu_query=None, options=PLAIN):
    """By sequence and token; without `cu_query` all are decodes."""
    out = torch.full_like(case.q, torch.nan)
    caches = (case.key_cache, case.value_cache, case.block_tables)
    most = 1 if cu_query is None else case.max_query
    invariant_attention(
        case.q, *caches, cu_query, case.kv_lens, most, case.max_kv, case.scale, case.window, out=out, rows=rows,
        options=options,
    )  # fmt: skip
    return out


@pytest.fixture
def short_spans(monkeypatch):
    """So that short sequences have several, in as many programs as there may be."""
    monkeypatch.setattr(attention, "SPAN", 32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block", "window"), [(3, 1, 24, 32, 0), (4, 2, 32, 16, 1), (4, 1, 64, 64, 37)]
)
def test_prompts(make_case, short_spans, heads, kv_heads, size, block, window):
    case = make_case([(5, 5), (1, 40), (9, 73), (2, 2)], heads, kv_heads, size, block, window)
    out = attend(case, cu_query=case.cu_query)
    torch.testing.assert_close(out, case.expected(), atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("programs", "window", "dtype"), [(1, 50, torch.float32), (512, 0, torch.float32), (512, 50, torch.bfloat16)]
)
def test_decodes(make_case, monkeypatch, programs, window, dtype):
    monkeypatch.setattr(attention, "SPAN", 64)
    monkeypatch.setattr(attention, "_PROGRAMS", programs)
    case = make_case([(1, kv) for kv in (1, 64, 0, 140)], 3, 1, 32, 16, window, dtype)
    slack = 5e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(case), case.expected(), atol=slack, rtol=slack)


@pytest.mark.parametrize(("options", "window"), [("plain", 0), ("all", 50)])
def test_one_program_or_several_give_the_same(make_case, device, short_spans, monkeypatch, window, options):
    given = PLAIN
    if options == "all":
        given = ScoreOptions(30.0, torch.rand(2, device=device), torch.randn(2, device=device))
    case = make_case([(1, kv) for kv in (1, 32, 0, 100)], 2, 1, 16, 16, window)
    apart = attend(case, options=given)
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)
    shuffled = torch.full_like(case.q, torch.nan)
    caches = (case.key_cache, case.value_cache, case.block_tables[order])
    invariant_attention(case.q, *caches, None, case.kv_lens[order], 1, case.max_kv, case.scale, window, out=shuffled,
                        rows=order, options=given)  # fmt: skip
    monkeypatch.setattr(attention, "_PROGRAMS", 1)
    assert torch.equal(attend(case, options=given), apart)
    assert torch.equal(shuffled, apart)
    rest = (case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens)
    expected = paged_prefill_reference(case.q, *rest, case.scale, window, options=given)
    torch.testing.assert_close(apart, expected, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_a_prompt_in_pieces_a_decode_and_a_replay_give_the_same(make_case, short_spans, window):
    """The last 20 of 90 tokens: at once, from the middle of a tile on, and one by one."""
    case = make_case([(20, 90)], 2, 1, 16, 16, window)
    whole = attend(case, cu_query=case.cu_query)
    caches = (case.key_cache, case.value_cache, case.block_tables)
    for first, count in ((13, 7), (19, 1)):
        at = torch.tensor([0, count], dtype=torch.int32, device=case.q.device)
        length = torch.tensor([70 + first + count], dtype=torch.int32, device=case.q.device)
        rest = (length, count, 90, case.scale, window)
        q = case.q[first : first + count]
        assert torch.equal(invariant_attention(q, *caches, at, *rest), whole[first : first + count])
        if count == 1:
            assert torch.equal(invariant_attention(q, *caches, None, *rest), whole[first : first + count])


def test_tokens_of_others_and_of_sequences_without_length_are_left_alone(make_case, device):
    case = make_case([(5, 40), (9, 9), (0, 0)], 2, 1, 16, 16)
    lead, rest = 7, 6
    q = torch.full((lead + len(case.q) + rest, 2, 16), torch.nan, device=device)
    q[lead:-rest] = case.q
    out = torch.full_like(q, 5.0)
    caches = (case.key_cache, case.value_cache, case.block_tables)
    lens = case.kv_lens.clone()
    lens[1] = 0
    invariant_attention(q, *caches, case.cu_query + lead, lens, len(q), case.max_kv, case.scale, out=out)
    assert (out[:lead] == 5.0).all()
    assert (out[lead + 5 : lead + 14] == 5.0).all()
    torch.testing.assert_close(out[lead : lead + 5], case.expected()[:5], atol=5e-6, rtol=2e-5)
