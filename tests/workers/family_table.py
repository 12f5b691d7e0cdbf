"""`make families`: the table of docs/models.md, the greatest difference of any logit from the reference, in fp32."""

from __future__ import annotations

import sys

import torch
from family_cases import CASES, WAYS, checkpoint, got, wanted

from workers.models.base import read_config
from workers.models.registry import find


def row(name: str) -> str:
    """One line of the table."""
    want, reference = wanted(name), "transformers" if CASES[name].tensors is None else "plain"
    config = read_config(checkpoint(name))
    cells = [name, config["architectures"][0], reference, f"{max(float(w.abs().max()) for w in want.values()):.1f}"]
    for tensor_parallel in (1, 2):
        found = got(name, tensor_parallel)
        cells += [f"{float((found[way] - want[way]).abs().max()):.0e}" for way in WAYS]
    return "| " + " | ".join([*cells, find(config).__module__.rpartition(".")[2] + ".py"]) + " |"


def main() -> None:
    """Print the rows of the cases named in the arguments, or of all."""
    torch.set_num_threads(1)
    ways = [f"{way}, tp={size}" for size in (1, 2) for way in WAYS]
    heads = ["case", "architecture", "reference", "greatest logit", *ways, "file"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name in sys.argv[1:] or CASES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
