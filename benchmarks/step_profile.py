"""Where the device's time goes in a step: kernels by name, what is idle between them, and a picture of it.

    python benchmarks/step_profile.py --batch 1 64 256                        # decodes
    python benchmarks/step_profile.py --batch 256 --prompts 60                # beside a new prompt each step
    python benchmarks/step_profile.py --workload W2a W2b --picture FILE.png   # the middle of workloads

The 8B Llama shape with random weights, its configuration that of `suite.py`. Busy is the union of the kernels' times,
idle the rest of the span from the first kernel to the last; --steps steps are traced, after all prompts have run, of a
workload when half of its answers are there. The picture shows --shown of them: what the device runs, and what the host
does meanwhile; where that is blank, it waits for the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import workloads
from load.records import versions
from load.work import make_work
from suite import limits
from torch.profiler import ProfilerActivity, profile, record_function

from workers.api.config import ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank

PROMPT = 128
HOST = ("plan", "submit", "commit")
KINDS = {  # by a part of the kernel's name
    "gemm": "products", "gemv": "products", "nvjet": "products", "cutlass": "products", "decode_kernel": "attention",
    "prefill_kernel": "attention", "combine_kernel": "attention", "sdpa": "attention", "Memcpy": "copies",
}  # fmt: skip


class Span(NamedTuple):
    """Microseconds of a kernel or of a part of the host's work."""

    begin: float
    end: float
    name: str


def traced(engine: Engine, go_on: Callable[[], bool]) -> tuple[list[Span], list[Span], int]:
    """Steps while `go_on`: what the device ran, what the host did, and their number."""
    torch.cuda.synchronize()
    steps = 0
    with ExitStack() as stack:
        parts = ((engine._scheduler, "plan"), (engine._executor, "submit"), (engine._committer, "commit"))
        for owner, name in parts:
            stack.enter_context(patch.object(owner, name, named(name, getattr(owner, name))))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]))
        while go_on():
            engine.step()
            steps += 1
        torch.cuda.synchronize()
    device, host = [], []
    for event in profiler.events():
        span = Span(event.time_range.start, event.time_range.end, event.name)
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in HOST:
            device.append(span)
        elif event.name in HOST:
            host.append(span)
    return sorted(device), sorted(host), steps


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, seen by the profiler under `name`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def decodes(engine: Engine, batch: int, steps: int, prompt: int) -> tuple[list[Span], list[Span], int]:
    """A batch of decodes, and a new prompt of `prompt` tokens each step."""
    for i in range(batch):
        engine.submit(EngineRequest(str(i), (17 + i,) * PROMPT, SamplingParams(4 * steps + 64, temperature=0.0)))
    while engine.load().prefill_backlog or engine.load().waiting:
        engine.step()
    for _ in range(8):
        engine.step()
    left = iter(range(steps))

    def go_on() -> bool:
        step = next(left, None)
        if step is not None and prompt:
            engine.submit(EngineRequest(f"p{step}", (7 + step,) * prompt, SamplingParams(1, temperature=0.0)))
        return step is not None

    found = traced(engine, go_on)
    engine.fail_all("measured")
    while engine.has_work:
        engine.step()
    return found


def workload(engine: Engine, name: str, steps: int) -> tuple[list[Span], list[Span], int]:
    """Steps in the middle of a workload."""
    work = make_work(name, rep=0, divide=1, vocab=workloads.VOCAB)
    for i, one in enumerate(work):
        engine.submit(EngineRequest(str(i), one.prompt, SamplingParams(one.out, temperature=0.0)))
    half, tokens = sum(one.out for one in work) // 2, 0
    while tokens < half:
        tokens += sum(len(delta.token_ids) for delta in engine.step())
    left = iter(range(steps))
    found = traced(engine, lambda: engine.has_work and next(left, None) is not None)
    while engine.has_work:
        engine.step()
    return found


def report(device: list[Span], steps: int, rows: int) -> dict[str, float]:
    """Prints kernels by their share; returns microseconds a step and the part that is idle."""
    busy, until = 0.0, device[0].begin
    for begin, end, _ in device:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    span = until - device[0].begin
    idle = 1 - busy / span
    print(
        f"  {steps} steps, {span / steps:.0f} us a step, busy {busy / steps:.0f}, idle {100 * idle:.2f} %", flush=True
    )
    by_name: dict[str, list[float]] = defaultdict(list)
    for begin, end, name in device:
        by_name[name].append(end - begin)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:rows]:
        count, total = len(times) / steps, sum(times) / steps
        print(f"    {total:8.1f} us  {count:6.1f} x {total / count:7.2f}  {name[:90]}")
    return {"steps": steps, "us_a_step": span / steps, "busy_us_a_step": busy / steps, "idle": idle}


def draw(path: Path, found: dict[str, tuple[list[Span], list[Span], int]], shown: int) -> None:
    """The device's and the host's time line of `shown` steps in the middle of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    colours = {"products": "#3465a4", "attention": "#f57900", "copies": "#cc0000", "the rest": "#73a946"}
    colours |= dict(zip(HOST, ("#75507b", "#ad7fa8", "#c4a000"), strict=True))
    figure, axes = plt.subplots(len(found), 1, figsize=(12, 1.7 * len(found) + 0.6), squeeze=False)
    for axis, (title, (device, host, steps)) in zip(axes[:, 0], found.items(), strict=True):
        middle = device[len(device) // 2].begin
        length = shown * (device[-1].end - device[0].begin) / steps
        for row, spans in ((1, device), (0, host)):
            inside = [s for s in spans if s.end >= middle and s.begin <= middle + length]
            bars = [((s.begin - middle) / 1e3, (s.end - s.begin) / 1e3) for s in inside]
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=[colours[kind(s.name)] for s in inside])
        axis.set_xlim(0, length / 1e3)
        axis.set_yticks([0, 1], ["host", "device"])
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("ms")
    figure.legend(handles=[Patch(color=c, label=name) for name, c in colours.items()], loc="upper right", ncols=8,
                  fontsize=8)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)


def kind(name: str) -> str:
    """What a kernel is shown as."""
    if name in HOST:
        return name
    return next((of for part, of in KINDS.items() if part in name), "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=0, help="tokens of a new prompt each step")
    parser.add_argument("--workload", nargs="+", choices=list(workloads.ALL), default=[], help="instead of batches")
    parser.add_argument("--rows", type=int, default=14)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--shown", type=int, default=3, help="steps in the picture")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llama-8b-"))
    (folder / "config.json").write_text(json.dumps(workloads.CONFIG))
    rank = Rank(ReplicaConfig(ModelConfig(str(folder), "llama-8b", load_format="dummy"), limits(small=False)))
    print({name: round(seconds, 2) for name, seconds in rank.phases.items()})
    found, figures = {}, {}
    for what in args.workload or args.batch:
        title = what if args.workload else f"{what} decodes"
        print(title + (f" and a prompt of {args.prompts} tokens" if args.prompts else ""))
        began = time.perf_counter()
        engine = rank.make_engine()
        spans = workload(engine, what, args.steps) if args.workload else decodes(engine, what, args.steps, args.prompts)
        found[title] = spans
        figures[title] = report(spans[0], spans[2], args.rows)
        print(f"    traced in {time.perf_counter() - began:.1f} s", flush=True)
    if args.picture:
        draw(args.picture, found, args.shown)
    if args.json:
        document = {"command": " ".join(sys.argv), "versions": versions(), "device": torch.cuda.get_device_name()}
        args.json.write_text(json.dumps({**document, "steps": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
