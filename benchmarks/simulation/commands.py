"""The subcommands of `simulate.py`: their options, progress, tables and pictures."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from simulation import dispatch, guarantees, isolation, scale, suites, what_if

Outcome = tuple[bool, Any]  # (whether all holds, what is written as JSON)
TAUS = (0.0025, 0.005, 0.010, 0.015, isolation.TAU, 0.020, 0.030, 0.050, 0.100)
STRATEGIES = ("oracle", "min_expected_latency", "lmdeploy", "power_of_two", "round_robin", "min_observed_latency")

_out = Console(width=None if sys.stdout.isatty() else 160)


def declare(commands: Any) -> None:
    """Add all subcommands."""

    def add(name: str, run: Callable[[argparse.Namespace], Outcome], text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        parser.set_defaults(run=run)
        parser.add_argument("--json", type=Path, help="write the figures here")
        return parser

    parser = add("guarantees", run_guarantees, "the table of guarantees; exits with 1 on a miss")
    parser.add_argument("--trials", type=int, default=10_000, help="traces of G2")
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual seconds of G3")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--state", type=Path, help="G2 goes on from this file")
    parser.add_argument("--quick", action="store_true", help="shorter runs, for CI")
    parser.add_argument("--only", nargs="*", choices=list(guarantees.CHECKS), help="these rows")
    parser = add("suites", run_suites, "VTC's suites under four policies, and the frontier of tau")
    parser.add_argument("--pictures", type=Path, help="a folder for PNGs (needs matplotlib)")
    parser.add_argument("--only", nargs="*", help="these suites; `frontier` is one")
    parser = add("dispatch", run_dispatch, "replicas of speed 1:2:4, one of which turns 10x slower")
    parser.add_argument("--seeds", type=int, default=3)
    parser = add("scale", run_scale, "a thousand replicas, a million requests")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.7, help="part of what all replicas can do")
    parser = add("what-if", what_if_command, "a recorded trace under another configuration")
    parser.add_argument("trace", type=Path, help="JSON lines; see simulation/what_if.py")
    parser.add_argument("--qos-config-path", type=Path)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2], help="tried one after the other")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--pool", type=int, default=437_000, help="tokens of KV cache of a replica")


def run_guarantees(given: argparse.Namespace) -> Outcome:
    """Row after row, shown as they come."""
    effort = guarantees.Effort(given.trials, given.seconds, given.processes, given.quick, given.state)
    names = given.only or list(guarantees.CHECKS)
    table = Table("", "figure", "bound", "holds", "trials", "what", title="Guarantees, in simulation")
    rows: dict[str, Any] = {}
    with Progress(console=Console(stderr=True)) as progress:
        every = progress.add_task("rows", total=len(names))
        for name in names:
            task = progress.add_task(name, total=effort.trials if name == "G2" else None)
            row = guarantees.checked(name, effort, lambda task=task: progress.advance(task))
            progress.remove_task(task)
            progress.advance(every)
            rows[name] = row.as_json()
            mark = "[green]yes" if row.passed else "[red]no"
            table.add_row(name, f"{row.figure:.4g}", f"{row.bound:.4g}", mark, str(row.trials), row.says)
    _out.print(table)
    return all(row["pass"] for row in rows.values()), rows


def run_suites(given: argparse.Namespace) -> Outcome:
    """A table; with `--pictures` service over time of each, and the frontier."""
    draw = None if given.pictures is None else importlib.import_module("simulation.pictures")  # if it is missing, now
    known = suites.suites()
    wrong = set(given.only or ()) - {s.name for s in known} - {"frontier"}
    if wrong:
        sys.exit(f"no suite is called {', '.join(sorted(wrong))}")
    chosen = [s for s in known if not given.only or s.name in given.only]
    table = Table("suite", "policy", "tok/s", "answer tok/s", "gap", "TTFT of light users", "rejected")
    results: dict[str, list[suites.Result]] = defaultdict(list)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("suites", total=len(chosen) * len(suites.POLICIES))
        for suite in chosen:
            for policy in suites.POLICIES:
                got = suites.run(suite, policy)
                results[suite.name].append(got)
                progress.advance(task)
                table.add_row(
                    suite.name, policy, f"{got.tokens:.0f}", f"{got.output:.0f}", f"{got.gap:,.0f}",
                    f"{got.light:.2f} s", f"{got.rejected:.0%}",
                )  # fmt: skip
    if chosen:
        _out.print(table)
    written: dict[str, Any] = {
        name: [{k: v for k, v in asdict(r).items() if k != "rows"} for r in rows] for name, rows in results.items()
    }
    with_frontier = not given.only or "frontier" in given.only
    if with_frontier:
        written["frontier"] = frontier = isolation.frontier(TAUS)
        shape = Table("flood", "tau", "ITL p99", "TTFT p99", "throughput / FIFO's")
        for row in frontier:
            shape.add_row(
                row["flood"], f"{1e3 * row['tau']:g} ms", f"{1e3 * row['itl']:.1f} ms",
                f"{1e3 * row['ttft']:.0f} ms", f"{row['speed']:.2f}",
            )  # fmt: skip
        _out.print(shape)
    if draw is not None:
        if chosen:
            draw.draw_suites(chosen, results, given.pictures)
        if with_frontier:
            draw.draw_frontier(frontier, given.pictures)
    return True, written


def run_dispatch(given: argparse.Namespace) -> Outcome:
    """The bounds are on means over the seeds."""
    table = Table("strategy", "TTFT p50", "p99", "p99 / oracle", "shares 1:2:4", "prediction error", "refused")
    runs: dict[str, list[dispatch.Run]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("dispatch", total=len(STRATEGIES) * given.seeds)
        for strategy in STRATEGIES:
            runs[strategy] = []
            for seed in range(given.seeds):
                runs[strategy].append(dispatch.run(strategy, seed))
                progress.advance(task)
    written = {name: dispatch.summary(got) for name, got in runs.items()}
    oracle = written["oracle"]["p99"]
    for name, row in written.items():
        shares = " : ".join(f"{share:.2f}" for share in row["shares"])
        table.add_row(
            name, f"{1e3 * row['p50']:.0f} ms", f"{1e3 * row['p99']:.0f} ms", f"{row['p99'] / oracle:.2f}",
            shares, f"{row['error']:.0%}", str(row["refused"]),
        )  # fmt: skip
    _out.print(table)
    ours = written["min_expected_latency"]
    holds = {
        "p99 <= 1.15 oracle": ours["p99"] <= 1.15 * oracle,
        "30 % below LMDeploy's formula": ours["p99"] <= 0.7 * written["lmdeploy"]["p99"],
        "30 % below power of two": ours["p99"] <= 0.7 * written["power_of_two"]["p99"],
        "prediction error <= 15 %": ours["error"] <= 0.15,
    }
    for name, holds_it in holds.items():
        _out.print(f"{'holds ' if holds_it else 'MISSED'}  {name}")
    return all(holds.values()), {"strategies": written, "holds": holds}


def run_scale(given: argparse.Namespace) -> Outcome:
    """One run; run it twice to compare digests."""
    gc.freeze()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("requests ended", total=given.requests)

        def tell(ended: int) -> None:
            if ended % 1000 == 0:
                progress.update(task, completed=ended)

        got = scale.run(
            replicas=given.replicas, requests=given.requests, seed=given.seed, load=given.load, progress=tell
        )
    table = Table("", "")
    for name, value in asdict(got).items():
        table.add_row(
            name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
    _out.print(table)
    return True, asdict(got)


def what_if_command(given: argparse.Namespace) -> Outcome:
    """A table of TTFT and ITL by tier for each number of replicas."""
    table = Table("replicas", "tier", "requests", "refused", "TTFT p50", "p99", "ITL p50", "p99", "waited p99")
    rows = what_if.run(
        given.trace, qos=given.qos_config_path, replicas=given.replicas, slots=given.slots, pool=given.pool
    )
    for row in rows:
        times = [f"{1e3 * t:.0f} ms" for t in (row.ttft, row.ttft_p99, row.itl, row.itl_p99, row.waited_p99)]
        table.add_row(str(row.replicas), row.tier, str(row.requests), str(row.refused), *times)
    _out.print(table)
    return True, [asdict(row) for row in rows]
