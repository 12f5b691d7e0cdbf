"""Prefill attention at the 8B Llama shape: ways to cut a launch.

python benchmarks/prefill_attention.py

For each batch (prompts x tokens, behind tokens cached) the time of a layer and the rate of its causal half.
"""

from __future__ import annotations

import statistics
from unittest.mock import patch

import torch

from kernels import paged_prefill as module
from kernels.paged_prefill import PrefillTuning, paged_prefill, paged_prefill_reference

HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 16
CASES = ((1, 8000, 0), (37, 220, 0))
TUNINGS = (
    *(PrefillTuning(128, 64, 8, 3), PrefillTuning(128, 64, 4, 3), PrefillTuning(128, 64, 4, 2)),
    *(PrefillTuning(256, 64, 8, 2), PrefillTuning(256, 64, 8, 3), PrefillTuning(256, 32, 8, 3)),
    *(PrefillTuning(64, 64, 4, 3), PrefillTuning(128, 128, 8, 2), PrefillTuning(256, 128, 16, 2)),
)


def main() -> None:
    for prompts, count, behind in CASES:
        length = count + behind
        pages = -(-length // PAGE)
        shape = (prompts * pages, PAGE, KV_HEADS, SIZE)
        keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        tables = torch.randperm(prompts * pages, device="cuda", dtype=torch.int32).view(prompts, pages)
        lens = torch.full((prompts,), length, device="cuda", dtype=torch.int32)
        starts = torch.arange(prompts + 1, device="cuda", dtype=torch.int32) * count
        q = torch.randn(prompts * count, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        first = q[:count].clone()
        wanted = paged_prefill_reference(first, keys, values, tables[:1], starts[:2], lens[:1], SIZE**-0.5)
        work = 4 * prompts * HEADS * SIZE * (count * behind + count * (count + 1) / 2)
        found = []
        for tuning in TUNINGS:
            with patch.object(module, "_tuning", lambda _q, _most, tuning=tuning: tuning):
                times = []
                for _ in range(8):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    out = paged_prefill(q, keys, values, tables, starts, lens, count, length, SIZE**-0.5)
                    end.record()
                    end.synchronize()
                    times.append(begin.elapsed_time(end))
            torch.testing.assert_close(out[:count], wanted, atol=3e-2, rtol=3e-2)
            found.append((statistics.median(times[2:]), tuning))
        found.sort(key=lambda pair: pair[0])
        print(f"{prompts} x {count} behind {behind}")
        for t, tuning in found[:4] + [pair for pair in found[4:] if pair[1] == TUNINGS[0]]:
            print(f"   {1e3 * t:8.1f} us {work / t / 1e9:6.0f} TFLOP/s  {tuning}")


if __name__ == "__main__":
    main()
