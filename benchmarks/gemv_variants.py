"""The product for one token at the 8B Llama shape: variants of the kernel beside cuBLAS, by CUDA graph, cold weights.

python benchmarks/gemv_variants.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from kernels.linear import gemv

SHAPES = {
    "qkv": (6144, 4096, 32),
    "output": (4096, 4096, 32),
    "gate-up": (28672, 4096, 32),
    "down": (4096, 14336, 32),
    "head": (128256, 4096, 1),
}
VARIANTS = ((1, 8), (2, 8), (1, 4), (2, 4), (4, 8), (1, 16), (2, 16))  # rows and warps a program
BYTES = 400 << 20  # of weights in rotation: many times the cache


def milliseconds(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Of one product, the median over replays of a graph of all."""
    run(weights[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(weights))
    return statistics.median(times[2:])


def main() -> None:
    best_total = cublas_total = 0.0
    for name, (outputs, inputs, count) in SHAPES.items():
        copies = max(1, min(8, BYTES // (2 * outputs * inputs)))
        weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
        cublas = milliseconds(lambda w, x=x: F.linear(x, w), weights)
        found = []
        for rows, warps in VARIANTS:
            run = partial(gemv, x, rows=rows, warps=warps)
            found.append((milliseconds(run, weights), (rows, warps)))
        out = gemv(x, weights[-1])
        wanted = F.linear(x.double(), weights[-1].double())
        error = ((out.double() - wanted).norm() / wanted.norm()).item()
        found.sort()
        size = 2 * outputs * inputs / 1e6
        best_total += count * found[0][0]
        cublas_total += count * cublas
        print(f"{name}: cuBLAS {1e3 * cublas:.1f} us ({size / cublas:.0f} GB/s), error {error:.1e}")
        print("   " + ", ".join(f"{variant} {1e3 * t:.1f} us ({size / t:.0f})" for t, variant in found))
    print(f"a step of 32 layers and the head: cuBLAS {cublas_total:.2f} ms, the best of each {best_total:.2f} ms")


if __name__ == "__main__":
    main()
