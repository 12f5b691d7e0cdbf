"""How much the engine in this process does: requests and tokens a second on a workload or a data set.

    python benchmarks/throughput.py demo --workload W3 --divide 4 --requests 256     # CPU
    python benchmarks/throughput.py llama-8b --workload W1 W2a W2b W3 W4a W4b W5     # one GPU, random weights
    python benchmarks/throughput.py /models/X --dataset ShareGPT.json --concurrency 256

Greedy, end of sequence ignored, exact lengths; fresh prompts every repeat. Medians, with least and greatest.
"""

from __future__ import annotations

import argparse
from functools import partial

from load.engine_target import EngineTarget, load_rank, tokenizer_of
from load.options import add_pacing, add_shared, add_work, engine_config, measure, pacing_of, works
from load.records import make_console, show, summary, write

COLUMNS = ("requests_per_s", "output_tok_per_s", "input_tok_per_s", "ftl_ms_mean", "tpot_ms_mean", "cached_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a checkpoint's folder, or llama-8b (random weights)")
    for add in (add_work, add_pacing, add_shared):
        add(parser)
    args = parser.parse_args()

    console = make_console()
    with console.status(f"loading {args.model}"):
        rank = load_rank(args.model, engine_config(args), dtype=args.dtype, layers=args.layers, threads=args.threads)
    target = EngineTarget(rank)
    rows = {}
    for name, make in works(args, vocab=rank.vocab_size, tokenizer=partial(tokenizer_of, args.model)).items():
        runs = measure({"engine": target}, make, pacing_of(args), repeat=args.repeat, title=name, console=console)
        rows[name] = runs["engine"]
        show([(name, summary(rows[name]))], COLUMNS, console)
    if args.json:
        write(args.json, machine=target.machine(), rows=rows, more={"model": args.model})


if __name__ == "__main__":
    main()
