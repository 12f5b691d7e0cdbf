"""The attention kernels against their references, with NaN in outputs, unused blocks and tails."""

from __future__ import annotations

import pytest
import torch

from kernels import paged_decode as paged_decode_module
from kernels.paged_decode import decode_workspace_size, longest_first, paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference
from kernels.tuning import DecodeTuning

# Query heads, KV heads, head size, block size: groups of 1, 3, 4, 8, sizes that are no powers of two.
SHAPES = [(2, 2, 16, 16), (3, 1, 24, 32), (8, 2, 64, 64), (8, 1, 80, 128), (4, 1, 128, 16), (4, 4, 32, 32)]
TOLERANCE = {torch.float32: (5e-6, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}


def check_decode(case, workspace=None, bound=None):
    out = torch.full_like(case.q, torch.nan)
    bound = case.max_kv if bound is None else bound
    caches = (case.key_cache, case.value_cache, case.block_tables)
    result = paged_decode(case.q, *caches, case.kv_lens, bound, case.scale, case.window, out=out, workspace=workspace)
    assert result is out
    expected = paged_decode_reference(case.q, *caches, case.kv_lens, case.scale, case.window)
    atol, rtol = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(out, expected, atol=atol, rtol=rtol)


def check_prefill(case):
    out = torch.full_like(case.q, torch.nan)
    tensors = (case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens)
    result = paged_prefill(*tensors, case.max_query, case.max_kv, case.scale, case.window, out=out)
    assert result is out
    atol, rtol = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(out, paged_prefill_reference(*tensors, case.scale, case.window), atol=atol, rtol=rtol)


@pytest.mark.parametrize("block", [16, 64])
def test_prefill_leaves_the_tokens_of_a_sequence_without_length_alone(make_case, block):
    case = make_case([(20, 20), (9, 30), (5, 70)], 4, 2, 32, block)
    tensors = (case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query)
    whole = paged_prefill(*tensors, case.kv_lens, case.max_query, case.max_kv, case.scale)
    lens, out = case.kv_lens.clone(), torch.full_like(case.q, torch.nan)
    lens[1] = 0
    paged_prefill(*tensors, lens, case.max_query, case.max_kv, case.scale, out=out)
    assert out[20:29].isnan().all()
    assert torch.equal(out[:20], whole[:20])
    assert torch.equal(out[29:], whole[29:])


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
def test_decode(make_case, heads, kv_heads, size, block, window):
    check_decode(make_case([(1, kv) for kv in (1, 32, 77, 0, 200)], heads, kv_heads, size, block, window))


@pytest.mark.parametrize("bound", [200, 4000], ids=["whole", "split"])
def test_decode_in_any_order_is_the_same(make_case, bound):
    case = make_case([(1, kv) for kv in (40, 200, 0, 77, 1)], 4, 2, 32, 16)
    order = longest_first(case.kv_lens.cpu().numpy())
    assert order.tolist() == [1, 3, 0, 4, 2]
    rows, out = torch.from_numpy(order).int().to(case.q.device), torch.full_like(case.q, torch.nan)
    caches, sorted_by = (case.key_cache, case.value_cache), (case.block_tables[rows], case.kv_lens[rows])
    tuning = DecodeTuning(16, 4, 2, False)
    paged_decode(case.q, *caches, *sorted_by, bound, case.scale, out=out, tuning=tuning, rows=rows)
    plain = paged_decode(case.q, *caches, case.block_tables, case.kv_lens, bound, case.scale, tuning=tuning)
    assert torch.equal(out, plain)
    reference = paged_decode_reference(case.q, *caches, *sorted_by, case.scale, rows=rows)
    torch.testing.assert_close(out, reference, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_in_half_precision(make_case, dtype):
    check_decode(make_case([(1, 5), (1, 300)], 4, 1, 32, 16, dtype=dtype))


@pytest.mark.parametrize("window", [0, 150])
def test_decode_splits_a_long_cache_and_leaves_spare_splits_alone(make_case, device, window):
    case = make_case([(1, 3), (1, 410), (1, 0)], 4, 1, 32, 64, window)
    size = decode_workspace_size(case.q, 1, 2000, window)
    assert size > 0
    check_decode(case, torch.full((size,), torch.nan, device=device), bound=2000)


def test_a_large_batch_splits_only_what_is_long(make_case, device, monkeypatch):
    """Shares have a least size: short sequences are done by one program, long ones by several, in one launch."""
    monkeypatch.setattr(paged_decode_module, "_multiprocessors", lambda _device: 2)
    tuning = DecodeTuning(32, 4, 2, False, least=3, programs=32)
    monkeypatch.setattr(paged_decode_module, "_tuning", lambda _q, _kv_heads: tuning)
    case = make_case([(1, kv) for kv in (1, 96, 97, 0, 500, 31, 200, 1000)], 4, 2, 32, 16)
    size = decode_workspace_size(case.q, 2, 1000)
    workspace = torch.full((size,), torch.nan, device=device)
    check_decode(case, workspace, bound=1000)
    weights = workspace[-8 * 4 * 4 :].view(8, 4, 4)  # sequence, head, split
    written = [int((~row[0].isnan()).sum()) for row in weights]
    assert written == [0, 0, 2, 0, 4, 0, 3, 4]


def test_decode_of_one_part_needs_no_workspace(make_case):
    case = make_case([(1, 20), (1, 33)], 2, 2, 16, 16)
    assert decode_workspace_size(case.q, 2, case.max_kv) == 0
    check_decode(case)


def test_prefill_of_prompts_between_other_tokens(make_case, device):
    """As a padded step has it: the first prompt begins behind tokens of others, unused sequences are empty."""
    case = make_case([(5, 40), (9, 9), (0, 0), (0, 0)], 4, 2, 32, 16)
    lead, rest = 7, 6
    q = torch.full((lead + len(case.q) + rest, 4, 32), torch.nan, device=device)
    q[lead:-rest] = case.q
    out = torch.full_like(q, 5.0)
    caches = (case.key_cache, case.value_cache, case.block_tables)
    paged_prefill(q, *caches, case.cu_query + lead, case.kv_lens, len(q), case.max_kv, case.scale, out=out)
    assert (out[:lead] == 5.0).all()
    torch.testing.assert_close(out[lead:-rest], case.expected(), atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 1, 37])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block"), SHAPES)
def test_prefill(make_case, heads, kv_heads, size, block, window):
    check_prefill(make_case([(5, 5), (1, 40), (70, 133), (2, 2)], heads, kv_heads, size, block, window))


def test_prefill_of_many_short_sequences(make_case):
    check_prefill(make_case([(1 + i % 3, 3 + 7 * i) for i in range(7)] + [(0, 0)], 6, 2, 32, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_in_half_precision(make_case, dtype):
    check_prefill(make_case([(20, 90), (66, 66)], 4, 2, 32, 16, dtype=dtype))


def test_strided_queries_and_caches(make_case):
    """q as a part of a merged projection, and both caches as halves of one tensor, as the engine has them."""
    case = make_case([(3, 50), (1, 20)], 4, 2, 32, 16)
    merged = torch.cat([case.q, torch.full_like(case.q, torch.nan)], dim=1)
    both = torch.stack([case.key_cache, case.value_cache], dim=1)
    rest = (case.block_tables, case.cu_query, case.kv_lens)
    out = paged_prefill(merged[:, :4], both[:, 0], both[:, 1], *rest, 3, 50, case.scale)
    torch.testing.assert_close(out, case.expected(), atol=5e-6, rtol=2e-5)
    decoded = paged_decode(merged[2:, :4], both[:, 0], both[:, 1], case.block_tables, case.kv_lens, 50, case.scale)
    torch.testing.assert_close(decoded, case.expected()[2:], atol=5e-6, rtol=2e-5)
