"""How long one answer takes at fixed lengths and batch sizes: first token, tokens after it, tokens a second.

    python benchmarks/latency.py demo --concurrency 1 16 --prompt-tokens 1 128 --completion-tokens 128
    python benchmarks/latency.py llama-8b --concurrency 1 16 32 64
    python benchmarks/latency.py http://127.0.0.1:23333 --concurrency 1 16 --vocab 1024

MODEL is `demo`, a checkpoint's folder or `llama-8b` (in this process), or the URL of an OpenAI-compatible server. Every
row sends `concurrency` requests together, --rounds times; FTL is the first-token latency, ITL the gap between tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

from load.engine_target import EngineTarget, load_rank
from load.http_target import HttpTarget
from load.options import Target, add_shared, engine_config, measure
from load.records import make_console, show, summary, write
from load.work import Pacing, Work, fixed_work

COLUMNS = ("ftl_ms_min", "ftl_ms_mean", "ftl_ms_max", "itl_ms_p50", "itl_ms_p75", "itl_ms_p95", "itl_ms_p99",
           "output_tok_per_s")  # fmt: skip


def work_maker(count: int, concurrency: int, prompt: int, out: int, vocab: int) -> Callable[[int], list[Work]]:
    """What makes the requests of a row, fresh every repeat."""
    return lambda rep: fixed_work(count * concurrency, prompt, out, vocab=vocab, rep=rep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL|URL")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--completion-tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=3, help="batches a repeat")
    parser.add_argument("--vocab", type=int, default=32000, help="URL: token ids are drawn below")
    parser.add_argument("--name", help="URL: the model's name there (default: the first one listed)")
    add_shared(parser)
    args = parser.parse_args()
    console = make_console()
    target: Target
    if args.model.startswith(("http://", "https://")):
        web = HttpTarget(args.model, args.name, decode=None)
        target, machine, vocab = web, web.machine, args.vocab
    else:
        with console.status(f"loading {args.model}"):
            rank = load_rank(
                args.model, engine_config(args), dtype=args.dtype, layers=args.layers, threads=args.threads
            )
        own = EngineTarget(rank)
        target, machine, vocab = own, own.machine, rank.vocab_size
    rows = {}
    for concurrency, prompt, out in product(args.concurrency, args.prompt_tokens, args.completion_tokens):
        title = f"batch {concurrency}, {prompt} in, {out} out"
        make = work_maker(args.rounds, concurrency, prompt, out, vocab)
        pacing = Pacing(concurrency)
        rows[title] = measure({"x": target}, make, pacing, repeat=args.repeat, title=title, console=console)["x"]
    show([(title, summary(runs)) for title, runs in rows.items()], COLUMNS, console)
    if args.json:
        write(args.json, machine=machine(), rows=rows, more={"model": args.model})


if __name__ == "__main__":
    main()
