"""Decode attention at the 8B Llama shape: ways to cut a launch, by CUDA graph over caches that are not in the L2 cache.

python benchmarks/decode_attention.py

For each batch size and length (varied: those of a chat log, so many tokens in the mean) the time of a layer and the
bandwidth at which keys and values are read. A way is a tuning and how many programs a multiprocessor is given, at
least, by splitting long caches.
"""

from __future__ import annotations

import random
import statistics
from unittest.mock import patch

import torch

from kernels import paged_decode as module
from kernels.paged_decode import DecodeTuning, paged_decode, paged_decode_reference

HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 16
CACHE_BLOCKS = 200_000  # 6.5 GB each of keys and values
CASES = ((1, 256, False), (16, 500, True), (64, 384, False), (64, 500, True), (128, 500, True), (256, 500, True))
BEST, SPARING = DecodeTuning(64, 4, 2, False), DecodeTuning(64, 4, 2, False, least=8)
WAYS = (
    *((BEST, 4), (BEST, 16), (BEST, 32), (SPARING, 32), (SPARING, 64)),
    *((DecodeTuning(64, 4, 3, True), 4), (DecodeTuning(64, 4, 3, True), 32), (DecodeTuning(64, 4, 3, False, 8), 32)),
)


def lengths_of(batch: int, mean: int, varied: bool) -> list[int]:
    rng = random.Random(batch)
    raw = [rng.lognormvariate(0.0, 0.9) if varied else 1.0 for _ in range(batch)]
    return [min(4000, max(8, round(x * mean * batch / sum(raw)))) for x in raw]


def main() -> None:
    shape = (CACHE_BLOCKS, PAGE, KV_HEADS, SIZE)
    keys, values = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    for batch, mean, varied in CASES:
        lengths = lengths_of(batch, mean, varied)
        pages = -(-max(lengths) // PAGE)
        copies = max(1, min(8, CACHE_BLOCKS // (batch * pages)))
        free = torch.randperm(CACHE_BLOCKS, device="cuda", dtype=torch.int32)[: copies * batch * pages]
        tables = list(free.view(copies, batch, -1))
        lens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        q = torch.randn(batch, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        size = 2 * sum(lengths) * KV_HEADS * SIZE * 2
        few = min(4, batch)
        wanted = paged_decode_reference(q[:few], keys, values, tables[-1][:few], lens[:few], SIZE**-0.5)
        found = []
        for tuning, programs in WAYS:
            count = programs * torch.cuda.get_device_properties(0).multi_processor_count
            with (
                patch.object(module, "_tuning", lambda _q, _heads, tuning=tuning: tuning),
                patch.object(module, "_programs_wanted", lambda _device, count=count: count),
            ):
                # Graphs bound every length by the context.
                paged_decode(q, keys, values, tables[0], lens, 8192, SIZE**-0.5)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for table in tables:
                        out = paged_decode(q, keys, values, table, lens, 8192, SIZE**-0.5)
            times = []
            for _ in range(10):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(1e3 * begin.elapsed_time(end) / copies)
            torch.testing.assert_close(out[:few], wanted, atol=2e-2, rtol=2e-2)
            found.append((statistics.median(times[2:]), tuning, programs))
        found.sort(key=lambda one: one[0])
        print(f"{batch} sequences of {'about ' if varied else ''}{mean}: {size / 1e6:.0f} MB")
        for t, tuning, programs in found:
            print(f"   {t:7.1f} us {size / t / 1e3:6.0f} GB/s  {programs} programs, {tuning}")


if __name__ == "__main__":
    main()
