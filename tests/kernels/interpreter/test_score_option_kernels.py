"""The attention kernels with soft caps, ALiBi and sinks against their references."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_tile import ScoreOptions
from kernels.paged_decode import decode_workspace_size, paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference

HEADS = 6


def options_of(name: str, device: torch.device) -> ScoreOptions:
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.03, 0.7, 0.01], device=device)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0], device=device)
    return {
        "cap": ScoreOptions(soft_cap=0.7),
        "alibi": ScoreOptions(slopes=slopes),
        "sinks": ScoreOptions(sinks=sinks),
        "all": ScoreOptions(0.7, slopes, sinks),
    }[name]


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("name", ["cap", "alibi", "sinks", "all"])
def test_prefill_and_decode(make_case, device, name, window):
    options = options_of(name, device)
    case = make_case([(5, 5), (1, 40), (20, 83)], HEADS, 2, 24, 16, window)
    out = torch.full_like(case.q, torch.nan)
    tensors = (case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens)
    paged_prefill(*tensors, case.max_query, case.max_kv, case.scale, window, out=out, options=options)
    wanted = paged_prefill_reference(*tensors, case.scale, window, options=options)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=2e-5)

    one = make_case([(1, 1), (1, 77), (1, 0)], HEADS, 2, 24, 16, window)
    caches = (one.key_cache, one.value_cache, one.block_tables)
    out = torch.full_like(one.q, torch.nan)
    paged_decode(one.q, *caches, one.kv_lens, one.max_kv, one.scale, window, out=out, options=options)
    wanted = paged_decode_reference(one.q, *caches, one.kv_lens, one.scale, window, options=options)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=2e-5)


def test_splits_of_a_long_cache_count_a_sink_once(make_case, device):
    options = options_of("all", device)
    case = make_case([(1, 3), (1, 410)], HEADS, 1, 32, 64)
    assert decode_workspace_size(case.q, 1, 2000) > 0
    caches = (case.key_cache, case.value_cache, case.block_tables)
    out = paged_decode(case.q, *caches, case.kv_lens, 2000, case.scale, options=options)
    wanted = paged_decode_reference(case.q, *caches, case.kv_lens, case.scale, options=options)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=2e-5)
