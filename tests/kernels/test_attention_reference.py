"""The attention references against dense attention."""

from __future__ import annotations

import pytest
import torch

from kernels import paged_dense
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


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("elements", "queries"), [(1, 1), (700, 3), (4000, 16), (1 << 30, 200)])
def test_however_the_batch_is_cut_the_output_is_the_same(make_case, monkeypatch, window, elements, queries):
    monkeypatch.setattr(paged_dense, "_ELEMENTS", elements)
    monkeypatch.setattr(paged_dense, "_QUERIES", queries)
    lengths = [(1, 90), (1, 1), (0, 30), (33, 70), (1, 90), (5, 5), (0, 0), (130, 131), (2, 64), (1, 17)]
    case = make_case(lengths, 6, 2, window=window)
    out = paged_prefill_reference(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens, case.scale, window
    )
    torch.testing.assert_close(out, case.expected(), atol=2e-6, rtol=1e-5)


def test_no_tile_is_larger_than_its_limit_or_mixes_decodes_with_prompts(make_case):
    case = make_case([(1, 5 * i + 1) for i in range(40)] + [(100, 100), (3, 80)], 6, 2)
    cu_query, kv_lens = case.cu_query.tolist(), case.kv_lens.tolist()
    shape = {"block_size": 16, "kv_channels": 1 << 10, "group": 3}
    tiles = paged_dense.make_tiles(case.block_tables, cu_query, kv_lens, window=0, **shape)
    assert all(len(t.slots) << 10 <= paged_dense._ELEMENTS for t in tiles)
    assert sum(t.pieces for t in tiles if t.queries == 1) == 40
    assert sum(t.pieces for t in tiles if t.queries > 1) == 3  # a prompt of 100 is two pieces
    assert paged_dense.make_tiles(case.block_tables[:1], [0, 0], [9], window=0, **shape) == []


def test_layers_share_a_memo_but_not_their_windows_or_caches(make_case):
    case, memo = make_case([(1, 40), (1, 9), (1, 77)], window=20), {}
    for caches in ((case.key_cache, case.value_cache), (-case.key_cache, 2 * case.value_cache)):
        for window in (20, 6):
            rest = (case.block_tables, case.kv_lens, case.max_kv, case.scale, window)
            shared = paged_decode(case.q, *caches, *rest, memo=memo)
            assert torch.equal(shared, paged_decode(case.q, *caches, *rest))
    if case.q.device.type == "cpu":  # the fast CPU path alone keeps tiles
        assert sorted(memo) == [6, 20]
