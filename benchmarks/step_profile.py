"""Where the device's time goes in a step: kernels by name, and what is idle between them.

    python benchmarks/step_profile.py --batch 1 64 256                 # decodes
    python benchmarks/step_profile.py --batch 256 --prompts 60         # beside a new prompt of 60 tokens every step

The 8B Llama shape with random weights. After all prompts have run, --steps steps are traced. Busy is the union of the
kernels' times, idle the rest of the span from the first kernel to the last, both a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import workloads
from torch.profiler import ProfilerActivity, profile

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank

PROMPT = 128


def trace(engine: Engine, batch: int, steps: int, prompt: int) -> list[Any]:
    """Kernels and copies of `steps` steps."""
    for i in range(batch):
        engine.submit(EngineRequest(str(i), (17 + i,) * PROMPT, SamplingParams(4 * steps + 64, temperature=0.0)))
    while engine.load().prefill_backlog or engine.load().waiting:
        engine.step()
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for step in range(steps):
            if prompt:
                engine.submit(EngineRequest(f"p{step}", (7 + step,) * prompt, SamplingParams(1, temperature=0.0)))
            engine.step()
        torch.cuda.synchronize()
    engine.fail_all("measured")
    while engine.has_work:
        engine.step()
    return [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def report(events: list[Any], steps: int, rows: int) -> None:
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    span = until - spans[0][0]
    print(f"  {span / steps:.0f} us a step, busy {busy / steps:.0f}, idle {100 * (1 - busy / span):.1f} %")
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name].append(event.time_range.end - event.time_range.start)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:rows]:
        count, total = len(times) / steps, sum(times) / steps
        print(f"    {total:8.1f} us  {count:6.1f} x {total / count:7.2f}  {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=0, help="tokens of a new prompt each step")
    parser.add_argument("--rows", type=int, default=14)
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llama-8b-"))
    (folder / "config.json").write_text(json.dumps(workloads.CONFIG))
    limits = EngineConfig(
        max_num_seqs=max(args.batch) + 8,
        max_num_batched_tokens=8192,
        prefix_caching=False,
        cuda_graphs=args.cuda_graphs,
    )
    rank = Rank(ReplicaConfig(ModelConfig(str(folder), "llama-8b", load_format="dummy"), limits))
    print({name: round(seconds, 2) for name, seconds in rank.phases.items()})
    for batch in args.batch:
        print(f"{batch} decodes" + (f" and a prompt of {args.prompts} tokens" if args.prompts else ""))
        report(trace(rank.make_engine(), batch, args.steps, args.prompts), args.steps, args.rows)


if __name__ == "__main__":
    main()
