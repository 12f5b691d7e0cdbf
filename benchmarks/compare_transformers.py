"""Our engine and transformers in one run, in turn: the same requests, device, dtype and weights.

    python benchmarks/compare_transformers.py demo --workload W3 --divide 4 --requests 256 --threads 1   # CPU
    python benchmarks/compare_transformers.py llama-8b --workload W1 W2b W3 --peers continuous           # one GPU

`generate` runs padded batches of 64 (or --concurrency), `continuous` transformers' own continuous batching. The ratio
is of output tokens a second (of input tokens where one token comes out), by neighbouring runs.
"""

from __future__ import annotations

import argparse
from functools import partial

import workloads
from load.engine_target import RANDOM_8B, EngineTarget, folder_of, load_rank, tokenizer_of
from load.options import Target, add_shared, add_work, engine_config, measure, works
from load.records import Run, make_console, show, summary, write
from load.transformers_target import ContinuousTarget, GenerateTarget, load_model
from load.work import Pacing

PEERS = {"generate": GenerateTarget, "continuous": ContinuousTarget}
COLUMNS = ("requests_per_s", "output_tok_per_s", "input_tok_per_s", "ftl_ms_mean")


def ratio(ours: list[Run], theirs: list[Run]) -> dict[str, float]:
    """How many times as fast ours is, over the pairs of neighbours."""
    return workloads.spread([t.seconds / o.seconds for o, t in zip(ours, theirs, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a checkpoint's folder, or llama-8b (random weights)")
    parser.add_argument("--peers", nargs="+", default=["generate"], choices=list(PEERS))
    parser.add_argument("--concurrency", type=int, default=0, help="batch of `generate` (0: 64)")
    for add in (add_work, add_shared):
        add(parser)
    args = parser.parse_args()

    console = make_console()
    with console.status(f"loading {args.model} twice"):
        rank = load_rank(args.model, engine_config(args), dtype=args.dtype, layers=args.layers, threads=args.threads)
        theirs = load_model(
            folder_of(args.model, layers=args.layers),
            dtype=next(rank.model.parameters()).dtype,
            device=rank.device,
            random=args.model == RANDOM_8B,
        )
    ours = EngineTarget(rank)
    targets: dict[str, Target] = {"echelon": ours, **{name: PEERS[name](theirs) for name in args.peers}}
    rows: dict[str, list[Run]] = {}
    for name, make in works(args, vocab=rank.vocab_size, tokenizer=partial(tokenizer_of, args.model)).items():
        runs = measure(targets, make, Pacing(args.concurrency), repeat=args.repeat, title=name, console=console)
        rows |= {f"{name} {who}": r for who, r in runs.items()}
        show([(f"{name} {who}", summary(r)) for who, r in runs.items()], COLUMNS, console)
        for who in args.peers:
            times = ratio(runs["echelon"], runs[who])
            console.print(
                f"{name}: {times['median']:.2f} times as fast as {who} ({times['min']:.2f} to {times['max']:.2f}, "
                f"n={times['n']})"
            )
    if args.json:
        write(args.json, machine=ours.machine(), rows=rows, more={"model": args.model})


if __name__ == "__main__":
    main()
