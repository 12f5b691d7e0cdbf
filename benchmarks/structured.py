"""Structured output: how many answers stop, how many of those are valid, what others pay.

    python benchmarks/structured.py answers [--schemas 500] [--seed 0] [--tokens 1024] [--wrap-up -1] [--seqs 32]
    python benchmarks/structured.py pairs [--shape demo|tiny|8b] [--streams 8 64] [--beside 8 64] [--pairs 12]

`answers` asks the demo model for one answer a schema (temperature 1, seeded) and judges it with jsonschema, formats
included. `pairs` times plain streams beside others that are plain, and beside others that have a grammar, in turns.
"""

from __future__ import annotations

import argparse
import importlib

KINDS = ("free", "tight")  # of `structured_pairs.PARTS`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("answers")
    for name, value in (("schemas", 500), ("seed", 0), ("tokens", 1024), ("wrap-up", -1), ("seqs", 32)):
        one.add_argument(f"--{name}", type=int, default=value)
    one.set_defaults(module="structured_answers")
    two = commands.add_parser("pairs")
    two.add_argument("--shape", choices=("demo", "tiny", "8b"), default="demo")
    two.add_argument("--streams", type=int, nargs="+", default=[8], help="plain ones, of each setting")
    two.add_argument("--beside", type=int, nargs="+", default=[8], help="others, of each setting")
    two.add_argument("--grammar", nargs="+", choices=KINDS, default=list(KINDS), help="with free strings, or without")
    two.add_argument("--pairs", type=int, default=12)
    two.add_argument("--tokens", type=int, default=160)
    two.add_argument("--temperature", type=float, default=1.0, help="of all streams")
    two.add_argument("--seconds", type=float, default=0.0, help="begin no further pair after so many (0: no limit)")
    two.set_defaults(module="structured_pairs")
    args = parser.parse_args()
    importlib.import_module(args.module).run(args)  # a machine may have what the one needs, and not what the other does


if __name__ == "__main__":
    main()
