"""Throughput of one engine in process, beside transformers' `generate`, on workloads with fixed lengths.

    python benchmarks/engine_throughput.py --workload W3 --divide 4 --peer            # CPU, the demo model
    python benchmarks/engine_throughput.py --model llama-8b --workload W1 W3          # one GPU, random weights

Lengths are those of `workloads.py`, divided by --divide; token ids are drawn below the model's vocabulary; greedy; end
of sequence is ignored. Every figure is a median over --repeat runs with the least and the greatest; peers run in the
same process, alternating with ours. Ratios count, digits depend on the machine; those of CPU time (of all threads) are
the steadier ones where others use it too.

The second line says where a step's time goes: the engine's part (planning, committing, the rest of its loop) and the
runner's (inputs, sampling, results, and the model with all that remains), in CPU time and in wall time of the thread
that does it. The host's wall time is the engine's and this loop's own. Exposed is the wall time in which the device (on
the CPU the runner) had nothing to do, hidden the rest of the host's. With --threaded the wall time of `inputs` beyond
its CPU time is mostly waiting for Python's lock: what hiding costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import workloads
from load.engine_target import folder_of, load_rank
from load.options import add_shared, engine_config
from load.transformers_target import GenerateTarget, load_model
from load.work import Pacing, Work, make_work

from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.execution import passes as passes_module
from workers.execution.padded import PaddedInputs
from workers.rank import Rank


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload. Seconds; `ttft` is the mean time to the first token; `parts` are (wall, CPU) a part."""

    seconds: float
    cpu_seconds: float
    output_tokens: int
    steps: int = 0
    device_seconds: float = 0.0
    ttft: float = 0.0
    host_seconds: float = 0.0
    exposed_seconds: float = 0.0
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)


class Parts:
    """Seconds by part of a step, of the wall and of the calling thread's CPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to part `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.seconds[name]
                spent[0] += time.perf_counter() - wall
                spent[1] += time.thread_time() - cpu

        return call

    def watch(self, rank: Rank, engine: Engine) -> ExitStack:
        """While the returned context is open, the parts of this engine's steps are timed."""
        watched = [
            (engine, "step", "step"),
            (engine._scheduler, "plan", "plan"),
            (engine._committer, "commit", "commit"),
            (rank.runner, "submit", "submit"),
            (rank.runner.state, "flatten", "inputs"),
            (rank.runner.state, "upload", "inputs"),
            (rank.runner.state, "upload_changes", "inputs"),
            (PaddedInputs, "fill", "inputs"),
            (passes_module, "sample_own", "sampling"),
            (rank.runner, "_result", "results"),
        ]
        if rank.device.type == "cpu":
            watched += [(rank.runner, "_begin", "run"), (rank.runner, "_finish", "run")]
        stack = ExitStack()
        for owner, attribute, name in watched:
            stack.enter_context(patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))
        return stack

    def finished(self, waited: float) -> dict[str, tuple[float, float]]:
        """(wall, CPU) of the parts, none in another; `waited`: wall seconds that the loop waited for results."""
        s = self.seconds
        own = [s["step"][i] - s["submit"][i] for i in (0, 1)]
        own[0] -= waited
        # On CUDA a step is queued in `submit`, and results are read elsewhere.
        run, inside = (
            (s["run"], ("inputs", "sampling", "results")) if "run" in s else (s["submit"], ("inputs", "sampling"))
        )
        spent: dict[str, list[float]] = {
            "engine": own,
            "rest": [own[i] - s["plan"][i] - s["commit"][i] for i in (0, 1)],
            "model": [run[i] - sum(s[name][i] for name in inside) for i in (0, 1)],
            **{name: s[name] for name in ("plan", "commit", "inputs", "sampling", "results")},
        }
        return {name: (wall, cpu) for name, (wall, cpu) in spent.items()}


def run_ours(rank: Rank, work: list[Work]) -> Run:
    """All requests at once through a fresh engine."""
    engine = rank.make_engine()
    for i, w in enumerate(work):
        engine.submit(EngineRequest(str(i), w.prompt, SamplingParams(w.out, temperature=0.0)))
    first: dict[str, float] = {}
    tokens = steps = 0
    device = 0.0
    parts = Parts()
    begin, cpu = time.perf_counter(), time.process_time()
    with parts.watch(rank, engine):
        while engine.has_work:
            deltas = engine.step()
            now = time.perf_counter() - begin
            steps += 1
            device += engine.load().step_seconds
            for d in deltas:
                tokens += len(d.token_ids)
                if d.token_ids and d.request_id not in first:
                    first[d.request_id] = now
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    engine.check_ledgers()
    if tokens != sum(w.out for w in work):
        raise SystemExit(f"{tokens} tokens instead of {sum(w.out for w in work)}")
    ttft = sum(first.values()) / len(first)
    waited = engine.stats.wait_seconds
    host = seconds - waited - parts.seconds["submit"][0]
    exposed = seconds - (parts.seconds["run"][0] if rank.device.type == "cpu" else device)
    return Run(seconds, cpu, tokens, steps, device, ttft, host, exposed, parts.finished(waited))


def run_transformers(peer: GenerateTarget, work: list[Work]) -> Run:
    """The same requests through `generate`, in batches of 64 padded on the left to the longest."""
    cpu = time.process_time()
    run = peer.run(work, Pacing(), lambda: None)
    return Run(run.seconds, time.process_time() - cpu, sum(w.out for w in work))


def report(name: str, requests: int, ours: list[Run], theirs: list[Run]) -> str:
    """One workload in words."""
    median = workloads.median
    rate = workloads.spread([r.output_tokens / r.seconds for r in ours])
    busy = median([100 * r.device_seconds / r.seconds for r in ours])
    text = (
        f"{name}: {rate['median']:.0f} output tok/s ({rate['min']:.0f} to {rate['max']:.0f}, n={rate['n']}), "
        f"{median([requests / r.seconds for r in ours]):.2f} requests/s, "
        f"{median([1e3 * r.seconds / r.steps for r in ours]):.3f} ms a step, device {busy:.0f} %, "
        f"mean TTFT {1e3 * median([r.ttft for r in ours]):.1f} ms"
    )
    text += "\n    " + report_parts(ours)
    if theirs:
        pairs = list(zip(ours, theirs, strict=True))
        ratio = workloads.spread([t.seconds / o.seconds for o, t in pairs])
        cpu = workloads.spread([t.cpu_seconds / o.cpu_seconds for o, t in pairs])
        text += (
            f"\n    transformers: {median([r.output_tokens / r.seconds for r in theirs]):.0f} output tok/s; "
            f"ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f}), "
            f"by CPU time {cpu['median']:.2f} times ({cpu['min']:.2f} to {cpu['max']:.2f})"
        )
    return text


def report_parts(runs: list[Run]) -> str:
    """Where the time of a step goes."""

    def each(name: str) -> str:
        wall, cpu = (1e3 * workloads.median([r.parts[name][i] / r.steps for r in runs]) for i in (0, 1))
        return f"{cpu:.3f} ({wall:.3f})"

    host = workloads.median([1e3 * r.host_seconds / r.steps for r in runs])
    exposed = workloads.median([1e3 * r.exposed_seconds / r.steps for r in runs])
    hidden = workloads.median([1 - r.exposed_seconds / r.host_seconds for r in runs])
    return (
        f"CPU (wall) ms a step: engine {each('engine')}, of it plan {each('plan')}, commit {each('commit')}, rest "
        f"{each('rest')}; runner: inputs {each('inputs')}, model {each('model')}, sampling {each('sampling')}, results "
        f"{each('results')}; host {host:.3f} wall, exposed {exposed:.3f}: {max(0.0, 100 * hidden):.0f} % is hidden"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or llama-8b (random weights)")
    parser.add_argument("--workload", nargs="+", default=["W3"], choices=list(workloads.ALL))
    parser.add_argument("--divide", type=int, default=1, help="divide all lengths")
    parser.add_argument("--requests", type=int, default=0, help="only the first so many")
    parser.add_argument("--equal", action="store_true", help="all lengths the mean")
    parser.add_argument("--peer", action="store_true", help="run transformers too")
    parser.add_argument("--threaded", action="store_true", help="CPU: run steps in a thread beside the planning")
    add_shared(parser)
    args = parser.parse_args()

    rank = load_rank(
        args.model,
        engine_config(args),
        dtype=args.dtype,
        layers=args.layers,
        threads=args.threads,
        threaded=args.threaded,
    )
    dtype = next(rank.model.parameters()).dtype
    peer = None
    if args.peer:
        peer = GenerateTarget(load_model(folder_of(args.model), dtype=dtype, device=rank.device, random=False))
    rows: list[dict[str, Any]] = []
    for name in args.workload:
        ours: list[Run] = []
        theirs: list[Run] = []
        for rep in range(args.repeat + 1):  # the first warms up
            work = make_work(name, rep=rep, divide=args.divide, vocab=rank.vocab_size, equal=args.equal)
            work = work[: args.requests or None]
            ours.append(run_ours(rank, work))
            if peer is not None:
                theirs.append(run_transformers(peer, work))
        ours, theirs = ours[1:], theirs[1:]
        print(report(name, len(work), ours, theirs))
        rows.append({"workload": name, "ours": [asdict(r) for r in ours], "transformers": [asdict(r) for r in theirs]})
    where = torch.cuda.get_device_name() if rank.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} in {dtype}, {where}, torch {torch.__version__}; {' '.join(sys.argv[1:])}")
    if args.json:
        args.json.write_text(json.dumps({"device": where, "arguments": sys.argv[1:], "rows": rows}, default=str))


if __name__ == "__main__":
    main()
