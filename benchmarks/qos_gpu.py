"""G1 and G4 of docs/qos.md, and how well first tokens are foretold, at one engine in this process, on its device and in
real time: no Ray, no HTTP.

    python benchmarks/qos_gpu.py --json qos-gpu.json                 # one GPU, the 8B shape with random weights
    python benchmarks/qos_gpu.py G1 --tau 0.010 0.014 0.018          # more points of the frontier
    python benchmarks/qos_gpu.py --model demo --divide 8 --max-num-seqs 8 --max-num-batched-tokens 64 --requests 60

Engines are made as replicas make theirs, with requests given to them when they are due. A bound is missed where the
figure, or all of its 95 % interval, is beyond it; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from in_process import conservation, isolation, predictions
from in_process.feed import Plant
from in_process.isolation import ITL_TARGET, Load
from live.figures import Figure, show, write
from load.engine_target import load_rank, machine

from router.qos.config import TAU
from workers.api.config import EngineConfig

PARTS: dict[str, Callable[[Plant, Load, argparse.Namespace], Iterator[list[Figure]]]] = {
    "G1": lambda plant, load, given: isolation.measure(
        plant, load, budget=given.max_num_batched_tokens, itl_target=given.itl_target, taus=given.tau
    ),
    "G4": lambda plant, load, given: conservation.measure(
        plant, pairs=given.pairs, requests=given.requests, divide=given.divide, block=EngineConfig().block_size
    ),
    "TTFT": lambda plant, load, given: predictions.measure(
        plant, rates=given.rates, seconds=given.foretell, divide=given.divide
    ),
}


def main() -> None:
    load, size = Load(), EngineConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--model", default="llama-8b", help="demo, a checkpoint's folder, or llama-8b (random weights)")
    parser.add_argument("--layers", type=int, default=0, help="llama-8b: only so many")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (CPU)")
    parser.add_argument("--max-num-seqs", type=int, default=size.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=size.max_num_batched_tokens)
    parser.add_argument("--divide", type=int, default=1, help="divide all lengths")
    parser.add_argument("--seconds", type=float, default=load.seconds, help="of each run of G1 (five, for one tau)")
    parser.add_argument(
        "--every", type=float, default=load.every, help="mean seconds between the upper tier's requests"
    )
    parser.add_argument("--crowd", type=int, default=load.crowd, help="requests of the flood to one of the upper tier")
    parser.add_argument("--tau", type=float, nargs="+", default=[TAU], help="seconds")
    parser.add_argument("--itl-target", type=float, default=ITL_TARGET, help="seconds, of the upper tier")
    parser.add_argument("--pairs", type=int, default=4, help="of runs of G4, for each pool")
    parser.add_argument("--requests", type=int, default=200, help="of a trace of G4")
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 25.0, 40.0], help="requests a second of TTFT")
    parser.add_argument("--foretell", type=float, default=15.0, help="seconds of each rate of TTFT")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    began = time.perf_counter()
    config = EngineConfig(max_num_seqs=given.max_num_seqs, max_num_batched_tokens=given.max_num_batched_tokens)
    rank = load_rank(given.model, config, layers=given.layers, threads=given.threads)
    plant = Plant(rank)
    load = Load(given.every, given.seconds, given.crowd).divided(given.divide)
    isolation.warm_up(plant, load)
    conservation.warm_up(plant, given.divide)
    print(f"loaded and warm after {time.perf_counter() - began:.1f} s", flush=True)
    found: dict[str, list[Figure]] = {}
    for part in PARTS if "all" in given.parts else given.parts:
        for figures in PARTS[part](plant, load, given):
            show(part, figures)
            found.setdefault(part, []).extend(figures)
    print(f"all of it took {time.perf_counter() - began:.1f} s")
    if given.json:
        write(given.json, found, machine=machine(rank))
    sys.exit(any(f.missed for figures in found.values() for f in figures))


if __name__ == "__main__":
    main()
