"""How `kernels.moe.grouped_linear` is best cut: microseconds of each cut, for products of the shapes of `moe.py`.

    python benchmarks/moe_cuts.py --json FILE      # one GPU, about half a minute, most of it the compiler's

Experts are drawn evenly. Matrices of several layers take turns, so that none is in the cache. `floor`: the microseconds
that reading the chosen experts' matrices takes at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from ceilings import measure
from load.goals import COPY
from load.records import versions

from kernels.expert_gemv import expert_rows, expert_sum
from kernels.moe import Cut, grouped_linear
from kernels.routing import route

SHAPES = {"mixtral-8x7b": (8, 2, 4096, 14336), "deepseek-moe-16b": (64, 6, 2048, 1408)}  # experts, chosen, C, N
BATCHES = (1, 64, 256)
FEW = ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3))
MANY = ((128, 64, 8, 3), (128, 128, 8, 3), (256, 64, 8, 3))
CUTS = [Cut(rows, *rest) for rows in (16, 32, 64, 128) for rest in (MANY if rows == 128 else FEW)]
COPIES, TRIALS = 4, 12


def rows_worth_trying(tokens: int, choices: int, experts: int) -> tuple[int, ...]:
    """Tiles about as high as an expert has entries."""
    mean = tokens * choices / experts
    return tuple(rows for rows in (16, 32, 64, 128) if mean / 2 <= rows <= max(16.0, 4 * mean))


def microseconds(launches: list[Callable[[], Any]]) -> float:
    """Of one launch, the copies in turn; the median of the trials."""
    turns, times = cycle(launches), []
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    for _ in range(TRIALS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(COPIES):
            next(turns)()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / COPIES)
    return sorted(times)[len(times) // 2]


def cases(shape: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Launches by what they multiply: `up` (gate and up) and `down`, for each batch and cut."""
    experts, choices, channels, inner = SHAPES[shape]
    up = torch.randn(COPIES, experts, 2 * inner, channels, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(COPIES, experts, channels, inner, device="cuda", dtype=torch.bfloat16)
    found = []
    for batch in batches:
        logits = torch.randn(batch, experts, device="cuda")
        chosen = logits.topk(choices).indices
        shares = torch.rand(batch, choices, device="cuda")
        routing, active = route(chosen, experts), len(chosen.unique())
        x = torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16)
        h = torch.randn(batch * choices, inner, device="cuda", dtype=torch.bfloat16)
        for name, weight, given, extra in (("up", up, x, None), ("down", down, h, shares)):
            one = {"shape": shape, "what": name, "batch": batch, "active": active, "bytes": weight[0, :active].nbytes}
            if batch == 1:
                gemv = [partial(expert_rows, given, w, None, chosen) if extra is None else
                        partial(expert_sum, given, w, None, chosen, extra) for w in weight]  # fmt: skip
                found.append({**one, "cut": "gemv", "launches": gemv})
            for cut in CUTS:
                if cut.rows in rows_worth_trying(batch, choices, experts):
                    launches = [partial(grouped_linear, given, w, None, routing, extra, cut) for w in weight]
                    cells = [cut.rows, cut.channels, cut.depth, cut.warps, cut.stages]
                    found.append({**one, "cut": cells, "launches": launches})
    return found


def attempt(case: dict[str, Any]) -> str:
    """Compile a case; what is wrong with it, if anything."""
    try:
        with torch.cuda.device(0):
            case["launches"][0]()
            torch.cuda.synchronize()
    except Exception as e:  # too much shared memory, say
        return f"{type(e).__name__}: {e}"[:200]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth, rows = measure()[COPY], []
    for shape in args.shape:
        todo = cases(shape, tuple(args.batch))
        with ThreadPoolExecutor(args.threads) as pool:
            errors = list(pool.map(attempt, todo))
        for case, error in zip(todo, errors, strict=True):
            row = {key: value for key, value in case.items() if key != "launches"}
            row["floor"] = row["bytes"] / bandwidth / 1e3
            row |= {"error": error} if error else {"microseconds": microseconds(case["launches"])}
            rows.append(row)
        del todo, case
        torch.cuda.empty_cache()
        if args.json:
            document = {"command": " ".join(sys.argv), "versions": versions(), "device": torch.cuda.get_device_name()}
            args.json.write_text(json.dumps({**document, "copy_GB_per_s": bandwidth, "rows": rows}, indent=1) + "\n")
    for key in dict.fromkeys((r["shape"], r["what"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["shape"], r["what"], r["batch"]) == key and "microseconds" in r]
        print(*key, f"floor {mine[0]['floor']:.0f} us,", f"{mine[0]['active']} experts:", flush=True)
        for row in sorted(mine, key=lambda r: r["microseconds"])[:4]:
            print(f"   {row['microseconds']:8.1f} us  {row['cut']}", flush=True)


if __name__ == "__main__":
    main()
