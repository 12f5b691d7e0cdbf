"""What one GPU can do at best: copy bandwidth and bf16 matrix rate. Run beside every figure, on the same machine.

python benchmarks/ceilings.py
"""

from __future__ import annotations

import statistics

import torch

COPY_BYTES = 4 << 30
SIDE = 8192
WARM_UP, TRIALS = 5, 20


def seconds(run: object) -> float:
    """Median over trials of one call, by device events."""
    assert callable(run)
    times = []
    for i in range(WARM_UP + TRIALS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= WARM_UP:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure() -> dict[str, float]:
    """GB/s of a copy (read plus write) and TFLOP/s of a bf16 product, on the current device."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)  # an engine may have all but little of the memory
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = seconds(lambda: target.copy_(source)), seconds(lambda: a @ b)
    return {"copy_GB_per_s": 2 * size / copy / 1e9, "bf16_TFLOP_per_s": 2 * SIDE**3 / product / 1e12}


def main() -> None:
    found = measure()
    print(
        f"{torch.cuda.get_device_name()}: copy {found['copy_GB_per_s']:.0f} GB/s read plus write, "
        f"bf16 {SIDE}^3 {found['bf16_TFLOP_per_s']:.0f} TFLOP/s"
    )


if __name__ == "__main__":
    main()
