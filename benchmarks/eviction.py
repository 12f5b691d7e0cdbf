"""What becomes of evicted KV blocks: computed again, or copied to host memory and back. In pairs on one engine's rank.

    python benchmarks/eviction.py [--model PATH] [--load-format dummy] [--dtype bfloat16] [--device cuda]
                                  [--chats 24] [--prompt 600] [--answer 16] [--room 8] [--pairs 5] [--json FILE]

Two loads, each once with either way, in turns, on engines over the same rank (fresh for each run):

  come back: --chats prompts come in turn, three times over; the pool holds --room of them, so that none is still there
    when it comes again
  preempted: all of them at once with long answers, in a pool that holds a third of what they grow to; sequences lose
    their blocks in the middle and go on later

Each pair's answers must be equal (--unequal: in bf16, whose rounding depends on what runs together, they need not).
Shown are seconds with copies by seconds with recomputing (under 1: copies win), and
what was run and copied.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.execution.cache import block_bytes
from workers.rank import Rank, run_to_completion

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo-model"
BLOCK = 16
ROUNDS = 3


@dataclass(frozen=True)
class Ran:
    """One run: `again` are tokens run a second time or for nothing."""

    seconds: float
    tokens: dict[str, list[int]]
    executed: int
    again: int
    preemptions: int
    out: int
    back: int


def requests(args: argparse.Namespace, vocab: int, answer: int) -> list[EngineRequest]:
    """Prompts that share nothing, greedy and seeded."""
    rng = random.Random(5)
    made = []
    for number in range(args.chats):
        prompt = tuple(rng.randrange(10, vocab) for _ in range(rng.randint(args.prompt * 3 // 4, args.prompt)))
        sampling: dict[str, Any] = {"temperature": 0.0} if number % 2 else {"temperature": 0.8, "seed": number}
        made.append(EngineRequest(f"r{number}", prompt, SamplingParams(max_tokens=answer, **sampling)))
    return made


def run(rank: Rank, rounds: Sequence[Sequence[EngineRequest]], blocks: int, host_blocks: int) -> Ran:
    """`rounds`, one request at a time where a round has only one."""
    engine = Engine(
        rank.config.engine,
        rank.runner,
        num_blocks=blocks,
        max_model_len=rank.max_model_len,
        vocab_size=rank.vocab_size,
        num_host_blocks=host_blocks,
    )
    tokens: dict[str, list[int]] = {}
    began = time.perf_counter()
    for number, asked in enumerate(rounds):
        found = run_to_completion(engine, asked)
        tokens |= {f"{number}/{name}": ids for name, ids in found.items()}
    seconds = time.perf_counter() - began
    engine.check_ledgers()
    stats, host = engine.stats, engine.roster.host
    return Ran(seconds, tokens, stats.executed, stats.overhead, stats.preemptions, host.copied_out, host.copied_in)


def pairs(name: str, rank: Rank, rounds: Sequence[Sequence[EngineRequest]], blocks: int, args: Any) -> dict[str, Any]:
    """--pairs of runs, which begins in turn; the first pair warms up and is left out."""
    ratios: list[float] = []
    ways = {"recompute": 0, "copy": rank.num_host_blocks}
    last: dict[str, Ran] = {}
    for number in range(args.pairs + 1):
        order = list(ways) if number % 2 else list(reversed(ways))
        last = {way: run(rank, rounds, blocks, ways[way]) for way in order}
        if last["copy"].tokens != last["recompute"].tokens and not args.unequal:
            raise SystemExit(f"{name}: the answers differ")
        if number:
            ratios.append(last["copy"].seconds / last["recompute"].seconds)
    middle = statistics.median(ratios)
    print(f"{name}: copy by recompute {middle:.3f} ({min(ratios):.3f}..{max(ratios):.3f}, n={len(ratios)})")
    for way, one in last.items():
        print(
            f"  {way}: {one.seconds:.2f} s, {one.executed} tokens run, {one.again} of them again or for nothing,"
            f" {one.preemptions} preemptions, {one.out} blocks out, {one.back} back",
            flush=True,
        )
    runs = {way: {k: v for k, v in vars(one).items() if k != "tokens"} for way, one in last.items()}
    return {"ratio": middle, "ratios": ratios, "last": runs}


def main(args: argparse.Namespace) -> None:
    most = (args.prompt + (args.answer if args.part == "come back" else args.prompt)) // BLOCK + 2
    engine = EngineConfig(
        block_size=BLOCK,
        max_num_seqs=max(args.chats, 8),
        max_num_batched_tokens=max(args.step, args.chats),
        num_blocks=max(args.room + 1, args.chats // 3 + 1) * most,
        eviction_type="copy",
        num_cpu_blocks=(args.chats + 1) * most,
    )
    model = ModelConfig(
        str(args.model), "model", dtype=args.dtype, load_format=args.load_format, max_model_len=most * BLOCK
    )
    rank = Rank(ReplicaConfig(model, engine, device=args.device), threads=1, threaded=args.device != "cuda")
    size = block_bytes(rank.specs, BLOCK)
    print(f"a block of {BLOCK} tokens has {size} bytes; on {rank.device}")
    asked = requests(args, rank.vocab_size, args.answer)
    need = -(-(args.prompt + args.answer) // BLOCK)
    figures: dict[str, Any] = {"block_bytes": size}
    if args.part != "preempted":
        figures["come back"] = pairs("come back", rank, [[one] for one in asked] * ROUNDS, args.room * need, args)
    long = requests(args, rank.vocab_size, args.prompt)
    grown = sum(-(-(len(one.prompt_ids) + args.prompt) // BLOCK) for one in long)
    if args.part != "come back":
        figures["preempted"] = pairs("preempted", rank, [long], max(grown // 3, most), args)
    rank.close()
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--load-format", default="safetensors")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chats", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--room", type=int, default=8, help="chats that the pool holds")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--step", type=int, default=512, help="query tokens of a step")
    parser.add_argument("--unequal", action="store_true", help="answers of a pair need not be equal")
    parser.add_argument("--part", choices=["come back", "preempted"], help="default: both")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
