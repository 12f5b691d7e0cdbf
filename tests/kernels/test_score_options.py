"""Soft caps, ALiBi and sinks in the attention references, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.attention_tile import PLAIN, ScoreOptions
from kernels.paged_decode import paged_decode_reference
from kernels.paged_prefill import paged_prefill_reference

HEADS = 6
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.03, 0.7, 0.01])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])
OPTIONS = {
    "cap": ScoreOptions(soft_cap=0.7),
    "alibi": ScoreOptions(slopes=SLOPES),
    "sinks": ScoreOptions(sinks=SINKS),
    "all": ScoreOptions(0.7, SLOPES, SINKS),
}


def options_on(device: torch.device, name: str) -> ScoreOptions:
    soft_cap, slopes, sinks = OPTIONS[name].soft_cap, OPTIONS[name].slopes, OPTIONS[name].sinks
    return ScoreOptions(soft_cap, *(None if t is None else t.to(device) for t in (slopes, sinks)))


def expected(case, options: ScoreOptions) -> torch.Tensor:
    """One query, one head, one key at a time."""
    out, row = torch.zeros_like(case.q), 0
    for keys, values, queries in zip(case.keys, case.values, case.cu_query.diff().tolist(), strict=True):
        for i in range(queries):
            at = len(keys) - queries + i
            first = max(0, at - case.window + 1) if case.window else 0
            for head in range(HEADS):
                kv = head // (HEADS // keys.shape[1])
                scores = []
                for position in range(first, at + 1):
                    score = float(case.q[row, head] @ keys[position, kv]) * case.scale
                    if options.soft_cap:
                        score = options.soft_cap * math.tanh(score / options.soft_cap)
                    if options.slopes is not None:
                        score += float(options.slopes[head]) * (position - at)
                    scores.append(math.exp(score))
                total = sum(scores) + (0.0 if options.sinks is None else math.exp(options.sinks[head]))
                weights = torch.tensor(scores, device=case.q.device) / total
                out[row, head] = weights @ values[first : at + 1, kv]
            row += 1
    return out


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_changed_as_the_formulas_say(make_case, device: torch.device, name: str, window: int) -> None:
    options = options_on(device, name)
    case = make_case([(3, 3), (1, 20), (2, 17)], HEADS, 2, 8, window=window)
    tensors = (case.q, case.key_cache, case.value_cache, case.block_tables)
    out = paged_prefill_reference(*tensors, case.cu_query, case.kv_lens, case.scale, window, options=options)
    torch.testing.assert_close(out, expected(case, options), atol=2e-6, rtol=1e-4)
    one = make_case([(1, 5), (1, 20)], HEADS, 2, 8, window=window)
    tensors = (one.q, one.key_cache, one.value_cache, one.block_tables)
    out = paged_decode_reference(*tensors, one.kv_lens, one.scale, window, options=options)
    torch.testing.assert_close(out, expected(one, options), atol=2e-6, rtol=1e-4)


def test_only_options_that_do_nothing_are_plain() -> None:
    assert PLAIN.is_plain
    assert not any(options.is_plain for options in OPTIONS.values())
