"""What the library's products take by number of tokens, added to a table of `autotune.py`.

    python benchmarks/autotune_products.py kernels/tables/h100.json

More tokens may take less, so `workers/execution/graphs.py` captures no step for which a greater one is as quick. Each
product runs from a CUDA graph over several weights, which the L2 cache does not hold; medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch.nn.functional as F
from autotune import DEVICE, render, replayed
from tuning_cases import COLD_BYTES, Arena, Case
from tuning_entries import WEIGHTS

SIZES = range(16, 1025, 16)


def product_case(arena: Arena, outputs: int, inputs: int, tokens: int) -> Case:
    """x [tokens, inputs] times some weights."""
    bytes_read = outputs * inputs * arena.dtype.itemsize
    weights = [arena.normal(outputs, inputs) for _ in range(1 + COLD_BYTES // bytes_read)]
    x = arena.normal(tokens, inputs)
    launches = [lambda _, weight=weight: F.linear(x, weight) for weight in weights]
    return Case(
        f"{tokens} x {outputs} x {inputs}", launches, launches[-1](None)[:1].float(), 0.0, 2 * x.numel() * outputs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    table = json.loads(args.table.read_text())
    arena = Arena(DEVICE, 1)
    table["products"] = []
    for outputs, inputs in WEIGHTS:
        times = {}
        for tokens in SIZES:
            case = product_case(arena, outputs, inputs, tokens)
            times[str(tokens)] = round(1e6 * replayed(case, None)[0], 1)
        table["products"].append({"outputs": outputs, "inputs": inputs, "microseconds": times})
        print(f"{outputs} x {inputs}: {times}", flush=True)
    args.table.write_text(render(table) + "\n")


if __name__ == "__main__":
    main()
