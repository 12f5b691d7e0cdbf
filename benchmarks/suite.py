"""Workloads W1 to W5 on this machine: our engine, transformers, what vLLM did on one like it, floors and ceilings.

    python benchmarks/suite.py --json benchmarks/results/h100.json     # one GPU, the 8B Llama shape, about 6 minutes
    python benchmarks/suite.py --small                                 # CPU: the demo model, lengths divided by 32

Each engine has a process of its own, one after the other, and all of the device's memory; the ceilings are measured
before each of them and at the end. One configuration for all workloads. Every figure is a median over
--repeat runs with fresh prompts, after one that warms up, with least and greatest; of a peer that is slow, over as many
as --peer-seconds allow, at least one. Exits with 1 where a figure is not what is asked of it (not with --small).

transformers runs its continuous batching, with the flash attention that torch ships, or its `generate` over padded
batches of 64, with the attention that it has without further packages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workloads
from load.engine_target import RANDOM_8B, EngineTarget, folder_of, load_rank
from load.goals import COPY, GOALS, PRODUCT, THEN
from load.options import Target
from load.records import Run, complain, make_console, progress_bar, summary, versions
from load.work import Pacing, make_work
from rich.console import Console
from rich.table import Table

NAMES = ("W1", "W2a", "W2b", "W3", "W4a", "W4b", "W5")
SMALL_DIVIDE, SMALL_REQUESTS = 32, 8
OURS, PEER, NOBODY = "echelon", "transformers", "nobody"
Figures = dict[str, dict[str, float]]


def limits(*, small: bool) -> Any:
    """The one configuration: as many sequences as W3 has requests in flight."""
    from workers.api.config import EngineConfig

    return EngineConfig(max_num_seqs=32 if small else 1024, max_num_batched_tokens=256 if small else 8192)


def repeated(target: Target, name: str, args: argparse.Namespace, console: Console, *, seconds: float) -> list[Run]:
    """Runs of one workload; not all that are asked for where they would take more than `seconds`."""
    runs: list[Run] = []
    began = time.perf_counter()
    with progress_bar(console) as progress:
        for rep in range(args.repeat + 1):
            work = make_work(name, rep=rep, divide=SMALL_DIVIDE if args.small else 1, vocab=args.vocab)
            work = work[: SMALL_REQUESTS if args.small else None]
            bar = progress.add_task(f"{name}: {f'{rep} of {args.repeat}' if rep else 'warming up'}", total=len(work))
            runs.append(target.run(work, Pacing(), lambda bar=bar: progress.advance(bar)))  # type: ignore[misc]
            progress.remove_task(bar)
            complain(runs[-1:])
            spent = time.perf_counter() - began
            if spent + spent / len(runs) > seconds:
                break
    return runs[1:] or runs


def measure_one(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The ceilings, and all workloads on one engine, in this process."""
    found: dict[str, Any] = {} if args.small else {"ceilings": ceilings()}
    if args.only == NOBODY:
        return found
    target, facts, args.vocab = peer(args) if args.only == PEER else our_engine(args)
    seconds = args.peer_seconds if args.only == PEER else float("inf")
    rows = {}
    for name in args.workload:
        rows[name] = summary(repeated(target, name, args, console, seconds=seconds))
        console.print(f"{args.only} {name}: {cell(rows[name]['requests_per_s'])} requests/s")
    return {**found, **facts, "rows": rows}


def our_engine(args: argparse.Namespace) -> tuple[Target, dict[str, Any], int]:
    """Target, what there is to say of it, and vocabulary."""
    model = "demo" if args.small else RANDOM_8B
    rank = load_rank(model, limits(small=args.small), threads=1 if args.small else None)
    return EngineTarget(rank), {"load_seconds_by_phase": rank.phases, "kv_blocks": rank.num_blocks}, rank.vocab_size


def peer(args: argparse.Namespace) -> tuple[Target, dict[str, Any], int]:
    """The same of transformers."""
    import torch
    from load.transformers_target import ContinuousTarget, GenerateTarget, load_model, use_torch_flash

    folder = folder_of("demo" if args.small else RANDOM_8B)
    dtype, device = (torch.float32, "cpu") if args.small else (torch.bfloat16, "cuda")
    model = load_model(folder, dtype=dtype, device=torch.device(device), random=not args.small)
    if args.peer == "continuous" and not args.small:
        use_torch_flash(model)
    target = GenerateTarget(model) if args.peer == "generate" else ContinuousTarget(model)
    return target, {"way": args.peer, "attention": model.config._attn_implementation}, model.config.vocab_size


def ceilings() -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a product, in memory that is given back."""
    import torch
    from ceilings import measure

    found = measure()
    torch.cuda.empty_cache()
    return found


def in_own_process(who: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure_one` for `who`."""
    names = args.peer_workload or args.workload if who == PEER else args.workload
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--only", who, "--json", str(out), "--workload", *names]
        command += ["--repeat", str(args.repeat), "--peer", args.peer, "--peer-seconds", str(args.peer_seconds)]
        done = subprocess.run([*command, *(["--small"] if args.small else [])], check=False)
        if done.returncode:
            raise SystemExit(f"{who}: {' '.join(command)} ended with {done.returncode}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def table(measured: dict[str, dict[str, Any]], names: list[str]) -> tuple[Table, list[str]]:
    """All goals of the workloads `names`, and those that were missed."""
    found = Table(box=None, header_style="bold", pad_edge=False)
    ours = measured[OURS]
    machine = {k: statistics.fmean(of["ceilings"][k] for of in measured.values()) for k in (COPY, PRODUCT)}
    for title in ("", "ours", "asked", "floor", "vLLM then", "vLLM scaled", "times vLLM", PEER, f"times {PEER}"):
        found.add_column(title, justify="left" if not title else "right")
    missed = []
    for goal in (g for g in GOALS if g.workload in names):
        mine = ours["rows"][goal.workload][goal.figure]
        value, scaled = mine["median"], goal.scaled(machine)
        if not goal.reached(value):
            missed.append(f"{goal.workload} {goal.figure}: {value:,.4g}, asked {goal.asked:,.4g}")
        cells = [cell(mine), f"{goal.asked:,.4g}", f"{goal.floor(machine):,.4g}", f"{goal.vllm:,.4g}"]
        cells += [f"{scaled:,.4g}", f"{goal.times_as_good(value, scaled):.2f}"]
        cells += peers_cells(goal.workload, measured)
        found.add_row(f"{goal.workload}, {goal.unit}", *cells)
    return found, missed


def peers_cells(name: str, measured: dict[str, dict[str, Any]]) -> list[str]:
    """Requests a second of the peer, and how many times as many ours answers: it does not tell when tokens came."""
    if PEER not in measured or name not in measured[PEER]["rows"]:
        return ["", ""]
    ours, theirs = (measured[who]["rows"][name]["requests_per_s"] for who in (OURS, PEER))
    return [cell(theirs) + " req/s", f"{ours['median'] / theirs['median']:.2f}"]


def cell(value: dict[str, float]) -> str:
    """Median, least, greatest, count."""
    return f"{value['median']:,.4g} ({value['min']:,.4g} to {value['max']:,.4g}, n={value['n']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=list(NAMES), choices=list(workloads.ALL))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", choices=("continuous", "generate", "none"), default="continuous", help="transformers")
    parser.add_argument("--peer-workload", nargs="+", choices=list(workloads.ALL), help="its workloads (default: all)")
    parser.add_argument("--peer-seconds", type=float, default=30.0, help="of a workload on transformers")
    parser.add_argument("--small", action="store_true", help="the demo model and short lengths, for a CPU")
    parser.add_argument("--only", choices=(OURS, PEER, NOBODY), help="this engine, in this process, figures to --json")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = make_console()
    if args.only:
        if args.json is None:
            parser.error("--only needs --json")
        args.json.write_text(json.dumps(measure_one(args, console)))
        return
    everybody = (OURS, *([] if args.peer == "none" else [PEER]), *([] if args.small else [NOBODY]))
    measured = {who: in_own_process(who, args) for who in everybody}
    missed: list[str] = []
    document = {"command": " ".join(sys.argv), "versions": versions(), "machine": machine_name(), "measured": measured}
    if not args.small:
        found, missed = table(measured, args.workload)
        console.print(found)
        for who, of in measured.items():
            now = of["ceilings"]
            console.print(f"ceilings before {who}: {now[COPY]:,.0f} GB/s, {now[PRODUCT]:,.0f} TFLOP/s")
        console.print(f"where vLLM was measured: {THEN[COPY]:,.0f} GB/s, {THEN[PRODUCT]:,.0f} TFLOP/s")
        document |= {"vllm_ceilings": THEN, "missed": missed}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))


def machine_name() -> str:
    """The device's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
