"""The attention references against dense attention."""

from __future__ import annotations

import pytest
import torch

from kernels.paged_decode import paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference

SHAPES = [(1, 1, 16, 16), (3, 3, 24, 32), (6, 2, 32, 16), (8, 2, 64, 64), (8, 1, 80, 128)]


@pytest.mark.parametrize("window", [0, 1, 13])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
def test_decode(make_case, heads, kv_heads, size, block, window):
    case = make_case([(1, kv) for kv in (1, 7, 16, 33, 130)], heads, kv_heads, size, block, window)
    out = paged_decode_reference(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.kv_lens, case.scale, window
    )
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 13])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
def test_prefill(make_case, heads, kv_heads, size, block, window):
    lengths = [(1, 1), (5, 5), (1, 40), (17, 33), (64, 64), (3, 131), (1, 63), (2, 2)]
    case = make_case(lengths, heads, kv_heads, size, block, window)
    out = paged_prefill_reference(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens, case.scale, window
    )
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)


def test_prefill_of_one_token_each_is_decode(make_case):
    case = make_case([(1, kv) for kv in (3, 20, 50)])
    rest = (case.kv_lens, case.scale)
    decoded = paged_decode_reference(case.q, case.key_cache, case.value_cache, case.block_tables, *rest)
    filled = paged_prefill_reference(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens, case.scale
    )
    torch.testing.assert_close(decoded, filled, atol=1e-6, rtol=1e-5)


def test_padding_rows_of_decode_are_zeros_in_the_given_output(make_case):
    case = make_case([(1, 9), (1, 0), (1, 30), (1, 0)])
    out = torch.full_like(case.q, torch.nan)
    result = paged_decode(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.kv_lens, case.max_kv, case.scale, out=out
    )
    assert result is out
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)
    assert not out[[1, 3]].any()


def test_prefill_writes_the_given_output(make_case):
    case = make_case([(4, 9), (0, 0), (20, 30)])
    out = torch.full_like(case.q, torch.nan)
    result = paged_prefill(
        case.q,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        case.cu_query,
        case.kv_lens,
        case.max_query,
        case.max_kv,
        case.scale,
        out=out,
    )
    assert result is out
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)


def test_a_larger_bound_than_any_length_changes_nothing(make_case):
    case = make_case([(1, 5), (1, 18)])
    out = paged_decode(case.q, case.key_cache, case.value_cache, case.block_tables, case.kv_lens, 900, case.scale)
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)
