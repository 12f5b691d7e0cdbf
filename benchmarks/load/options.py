"""The options that these programs share, and the loop over measurements and repeats."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import workloads
from rich.console import Console

from load.records import Run, complain, progress_bar
from load.work import Pacing, Work, make_work, read_dataset

Maker = Callable[[int], list[Work]]  # the requests of repeat n


class Target(Protocol):
    """What can be measured."""

    def run(self, work: Sequence[Work], pacing: Pacing, done: Callable[[], None]) -> Run:
        """One repeat of `work`."""


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Repeats, output, and what `engine_config` reads."""
    parser.add_argument("--repeat", type=int, default=3, help="measured repeats, after one to warm up")
    parser.add_argument("--json", type=Path, help="write figures and runs here")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layers", type=int, default=0, help="llama-8b: only so many")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (CPU)")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--step-ahead", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch-invariant", action="store_true", help="texts do not depend on what runs beside them")


def add_work(parser: argparse.ArgumentParser) -> None:
    """What `works` reads."""
    parser.add_argument("--workload", nargs="+", default=["W3"], choices=list(workloads.ALL))
    parser.add_argument("--dataset", type=Path, help="instead: ShareGPT's JSON, or JSON lines with prompt and out")
    parser.add_argument("--divide", type=int, default=1, help="divide all lengths of the workloads")
    parser.add_argument("--requests", type=int, default=0, help="only the first so many")


def add_pacing(parser: argparse.ArgumentParser) -> None:
    """What `pacing_of` reads."""
    parser.add_argument("--concurrency", type=int, default=0, help="requests in flight at most (0: all at once)")
    parser.add_argument("--request-rate", type=float, default=0.0, help="Poisson arrivals a second (0: at once)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")


def pacing_of(args: argparse.Namespace) -> Pacing:
    """As `add_pacing` put it."""
    return Pacing(args.concurrency, args.request_rate, args.seed)


def works(args: argparse.Namespace, *, vocab: int, tokenizer: Callable[[], Any]) -> dict[str, Maker]:
    """By name, what makes the requests; a data set's are the same in every repeat."""
    if args.dataset is not None:
        read = read_dataset(args.dataset, tokenizer().encode, limit=args.requests)
        return {args.dataset.name: lambda rep: read}

    def maker(name: str) -> Maker:
        return lambda rep: make_work(name, rep=rep, divide=args.divide, vocab=vocab)[: args.requests or None]

    return {name: maker(name) for name in args.workload}


def engine_config(args: argparse.Namespace) -> Any:
    """As `add_shared` put it."""
    from workers.api.config import EngineConfig

    return EngineConfig(
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefix_caching=args.prefix_caching,
        cuda_graphs=args.cuda_graphs,
        step_ahead=args.step_ahead,
        batch_invariant=args.batch_invariant,
    )


def measure(
    targets: dict[str, Target], make: Maker, pacing: Pacing, *, repeat: int, title: str,
    console: Console,
) -> dict[str, list[Run]]:  # fmt: skip
    """`repeat` runs of every target, in turn, after one that warms up. Raises SystemExit where requests fail."""
    runs: dict[str, list[Run]] = {name: [] for name in targets}
    with progress_bar(console) as progress:
        for rep in range(repeat + 1):
            work = make(rep)
            for name, target in targets.items():
                what = "warming up" if rep == 0 else f"{rep} of {repeat}"
                bar = progress.add_task(f"{title}, {name}: {what}", total=len(work))
                run = target.run(work, pacing, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
                progress.remove_task(bar)
                complain([run])
                if rep:
                    runs[name].append(run)
    return runs
