"""A server under load: any OpenAI-compatible URL, requests at a rate or so many at a time.

    python benchmarks/serving.py http://127.0.0.1:23333 --workload W3 --divide 4 --vocab 1024 --concurrency 64
    python benchmarks/serving.py http://host:8000/v1 --model NAME --tokenizer FOLDER --dataset ShareGPT.json \\
        --request-rate 4

Prompts are sent as token ids; --text sends text (of --tokenizer) to servers that do not take ids. FTL is the latency
of the first token, ITL the gap between arrivals, both as this client sees them; tokens are those that the server counts
in its usage. OPENAI_API_KEY is sent where it is set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from load.http_target import HttpTarget
from load.options import add_pacing, add_work, measure, pacing_of, works
from load.records import make_console, show, summary, write

COLUMNS = ("requests_per_s", "output_tok_per_s", "total_tok_per_s", "ftl_ms_min", "ftl_ms_mean", "ftl_ms_max",
           "ftl_ms_p99", "itl_ms_p50", "itl_ms_p95", "itl_ms_p99", "cached_tokens")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", help="its name there (default: the first one listed)")
    parser.add_argument("--tokenizer", help="a folder with the model's tokenizer: for --dataset and --text")
    parser.add_argument("--text", action="store_true", help="send prompts as text")
    parser.add_argument("--vocab", type=int, default=32000, help="token ids of the workloads are drawn below")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeat", type=int, default=3, help="measured repeats, after one to warm up")
    parser.add_argument("--json", type=Path, help="write figures and runs here")
    for add in (add_work, add_pacing):
        add(parser)
    args = parser.parse_args()

    def tokenizer() -> Any:
        from transformers import AutoTokenizer

        if not args.tokenizer:
            raise SystemExit("--dataset and --text need --tokenizer FOLDER")
        return AutoTokenizer.from_pretrained(args.tokenizer)

    console = make_console()
    target = HttpTarget(
        args.url, args.model, decode=tokenizer().decode if args.text else None, ignore_eos=args.ignore_eos
    )
    rows = {}
    for name, make in works(args, vocab=args.vocab, tokenizer=tokenizer).items():
        runs = measure({"server": target}, make, pacing_of(args), repeat=args.repeat, title=name, console=console)
        rows[name] = runs["server"]
        show([(name, summary(rows[name]))], COLUMNS, console)
    if args.json:
        write(
            args.json,
            machine=target.machine(),
            rows=rows,
            more={"pacing": {"concurrency": args.concurrency, "request_rate": args.request_rate}},
        )


if __name__ == "__main__":
    main()
