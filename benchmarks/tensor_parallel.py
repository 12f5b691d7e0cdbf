"""One replica over several GPUs of a host: workloads at each number of ranks, beside each other, and the time in sums.

    python benchmarks/tensor_parallel.py --tp 1 2 --workload W1 W3 --json FILE          # the 8B Llama shape
    python benchmarks/tensor_parallel.py --tp 2 --sums process-group                     # sums by NCCL alone
    python benchmarks/tensor_parallel.py --tp 2 --model llama-70b --workload W1          # random weights as well
    python benchmarks/tensor_parallel.py --tp 1 2 --small                                # CPUs and gloo, demo model

Ranks are processes that meet as those of a Ray gang do, without Ray and HTTP: rank 0 has the engine and sends plans.
One number of ranks after the other; configuration and repeats as in `suite.py`. --profile traces steps of rank 0: the
time in sums has in it the waiting for the other ranks, and the norms that are fused with them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import workloads
from load.engine_target import DEMO, EngineTarget
from load.ranks import run_together
from load.records import Run, complain, make_console, summary, versions
from load.work import Pacing, make_work
from suite import SMALL_DIVIDE, SMALL_REQUESTS, cell, limits

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": workloads.CONFIG,
    "llama-70b": {
        **workloads.CONFIG,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
}
PEERS, PROCESS_GROUP = "peers", "process-group"
SUMS = ("_sum_kernel", "nccl")  # parts of the names of kernels
FIGURES = ("requests_per_s", "output_tok_per_s", "tpot_ms_mean", "ftl_ms_mean")
READ_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Plans:
    """Where rank 0 tells the others its address."""

    file: Path

    def tell(self, address: tuple[str, int], secret: str) -> None:
        """Written beside it and renamed: it is there whole or not at all."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps([*address, secret]))
        draft.rename(self.file)

    def read(self) -> tuple[tuple[str, int], str]:
        """Waits for it."""
        deadline = time.monotonic() + READ_SECONDS
        while not self.file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        host, port, secret = json.loads(self.file.read_text())
        return (host, port), secret


def run_rank(args: argparse.Namespace) -> None:
    """One rank to its end; rank 0 measures and writes the figures to --json."""
    import torch

    from workers.api.config import ModelConfig, ReplicaConfig
    from workers.execution.gang import GangExecutor, follow
    from workers.parallel.channel import PlanReceiver, PlanSender
    from workers.parallel.group import connect, disconnect
    from workers.rank import Rank

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    size, folder = args.tp[0], Path(args.meet)
    if args.small:
        torch.set_num_threads(1)
        model, device = ModelConfig(str(DEMO), "demo", dtype="float32"), "cpu"
    else:
        torch.cuda.set_device(args.rank)
        model, device = ModelConfig(str(folder), args.model, load_format="dummy"), "cuda"
    groups = connect(
        rank=args.rank, tensor_parallel=size, init_method=f"file://{folder}/meet",
        backend="gloo" if args.small else "nccl",
    )  # fmt: skip
    plans = Plans(folder / "plans")
    sender = PlanSender("127.0.0.1", size - 1) if args.rank == 0 else None
    if sender is not None:
        plans.tell(sender.address, sender.secret)
    engine = limits(small=args.small)
    engine = replace(engine, max_num_seqs=args.sequences or engine.max_num_seqs)
    config = ReplicaConfig(model, engine, tensor_parallel=size, device=device)
    rank = Rank(config, rank=args.rank, groups=groups, peer_memory=args.sums == PEERS)
    gc.freeze()
    if sender is None:
        receiver = PlanReceiver(*plans.read(), f"rank {args.rank}")
        follow(rank.runner, receiver)
    else:
        sender.accept()
        found = measure(EngineTarget(rank, GangExecutor(rank.runner, sender) if size > 1 else None), args)
        args.json.write_text(json.dumps({"load_seconds_by_phase": rank.phases, "kv_blocks": rank.num_blocks, **found}))
        sender.close()
    rank.close()
    disconnect()


def measure(target: EngineTarget, args: argparse.Namespace) -> dict[str, Any]:
    """All workloads, and what traced steps are made of."""
    rows: dict[str, Any] = {}
    for name in args.workload:
        runs: list[Run] = []
        for rep in range(args.warm_up + args.repeat):
            work = make_work(name, rep=rep, divide=SMALL_DIVIDE if args.small else 1, vocab=target.rank.vocab_size)
            runs.append(target.run(work[: SMALL_REQUESTS if args.small else None], Pacing(), lambda: None))
            complain(runs[-1:])
            rate = len(runs[-1].records) / runs[-1].seconds
            print(f"tp={args.tp[0]} {name} {rep}: {rate:.2f} requests/s", flush=True)
        rows[name] = summary(runs[args.warm_up :])
    return {"rows": rows, "steps": profile(target, args) if args.profile else {}}


def profile(target: EngineTarget, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a step of decodes, and of the middle of W3: all, busy, in sums."""
    from step_profile import decodes, report, workload

    found = {}
    for what in (1, 64, "W3"):
        engine = target.engine()
        device, _, steps = workload(engine, what, 40) if isinstance(what, str) else decodes(engine, what, 20, 0)
        print(f"tp={args.tp[0]}, {what if isinstance(what, str) else f'{what} decodes'}")
        figures = report(device, steps, args.shown)
        sums = [s.end - s.begin for s in device if any(part in s.name for part in SUMS)]
        found[str(what)] = {**figures, "sums_a_step": len(sums) / steps, "us_in_sums_a_step": sum(sums) / steps}
        print(f"  in sums {sum(sums) / steps:.0f} us a step, {len(sums) / steps:.1f} of them", flush=True)
    return found


def in_processes(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """A gang of `size` ranks from its start to its end. Raises SystemExit where one fails; the others are ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPES[args.model]))
        command = [sys.executable, __file__, "--tp", str(size), "--meet", name, "--json", f"{name}/figures.json"]
        command += ["--workload", *args.workload, "--repeat", str(args.repeat), "--model", args.model]
        command += ["--sums", args.sums, "--shown", str(args.shown), "--warm-up", str(args.warm_up)]
        command += [flag for flag, given in (("--small", args.small), ("--profile", args.profile)) if given]
        codes = run_together([[*command, "--rank", str(rank)] for rank in range(size)])
        if any(codes):
            raise SystemExit(f"tp={size}: the ranks ended with {codes}")
        found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--model", choices=list(SHAPES), default="llama-8b")
    parser.add_argument("--sequences", type=int, help="in a step at most; fewer make fewer graphs and a faster start")
    parser.add_argument("--sums", choices=(PEERS, PROCESS_GROUP), default=PEERS)
    parser.add_argument("--workload", nargs="+", default=["W1", "W3"], choices=list(workloads.ALL))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="runs of each workload that do not count")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--shown", type=int, default=12, help="kernels of a profile that are printed")
    parser.add_argument("--small", action="store_true", help="the demo model and short lengths, on CPUs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args)
        return
    console = make_console()
    measured = {f"tp={size}": in_processes(size, args) for size in args.tp}
    for name in args.workload:
        for size, found in measured.items():
            console.print(name, size, *(f"{figure} {cell(found['rows'][name][figure])}" for figure in FIGURES))
    if args.json:
        document = {"command": " ".join(sys.argv), "versions": versions(), "measured": measured}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
