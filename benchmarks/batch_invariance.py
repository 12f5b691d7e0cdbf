"""Batch-invariant mode: how many tokens differ between requests alone, batched and replayed, and what it costs.

    python benchmarks/batch_invariance.py --model llama-8b --layers 4 --json out.json      # one GPU, random weights

Texts: requests with the prompt lengths of W3, every fifth with the beginning of the one before it, greedy, of --out
tokens. Alone: one after the other. Mixed: some arrive before each step, prompts run in chunks beside decodes, prefixes
are hit, and the pool is so small that sequences are preempted. Replayed: prompt and some of the answer are resubmitted,
mixed again. Counted are tokens that are not those of the request alone, with the mode on, and off for the first
--contrast requests.

Products: microseconds of one with each weight of the 8B shape, beside cuBLAS. Cost: output tokens a second of workloads
(--cost), each with all layers, mode on and off.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from load.engine_target import load_rank
from load.work import make_work

from kernels.invariant_linear import invariant_linear
from kernels.linear import linear
from workers.api.config import EngineConfig
from workers.api.request import EngineRequest, FinishReason, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank

WEIGHTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 8192)

Texts = dict[str, list[int]]
BEGAN = time.perf_counter()


def say(text: str) -> None:
    """With the seconds since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


def make_requests(count: int, out: int, divide: int, vocab: int) -> list[EngineRequest]:
    """Seeded; see above."""
    rng = random.Random(5)
    asked: list[EngineRequest] = []
    for i, (length, _) in enumerate(workloads.w3_lengths()[:count]):
        ids = tuple(rng.randrange(vocab * 9 // 10) for _ in range(max(1, length // divide)))
        if i % 5 == 4:
            before = asked[-1].prompt_ids
            ids = (*before[: rng.randrange(len(before)) + 1], *ids)
        asked.append(EngineRequest(str(i), ids, SamplingParams(out, temperature=0.0)))
    return asked


def tight(rank: Rank) -> Engine:
    """An engine that leaves no room to grow, so that sequences are preempted."""
    limits: dict[str, Any] = {"num_blocks": rank.num_blocks, "max_model_len": rank.max_model_len}
    return Engine(rank.config.engine, rank.runner, vocab_size=rank.vocab_size, watermark=0, **limits)


def run(
    rank: Rank,
    asked: Iterable[EngineRequest],
    arrivals: Callable[[], int],
    make_engine: Callable[[Rank], Engine] = tight,
) -> tuple[Texts, int]:
    """What was emitted by each, and how often one was preempted; `arrivals()` requests come before each step."""
    engine, waiting = make_engine(rank), list(asked)[::-1]
    texts: Texts = {one.id: [] for one in waiting}
    while waiting or engine.has_work:
        for _ in range(min(arrivals(), len(waiting))):
            engine.submit(waiting.pop())
        for delta in engine.step():
            texts[delta.request_id] += delta.token_ids
            if delta.finish is FinishReason.ERROR:
                raise SystemExit(f"{delta.request_id}: {delta.error}")
    engine.check_ledgers()
    return texts, engine.stats.preemptions


def run_alone(rank: Rank, asked: list[EngineRequest]) -> Texts:
    """One after the other, none of which finds another's prefix."""
    return {one.id: run(rank, [one], lambda: 1)[0][one.id] for one in asked}


def mixed() -> Callable[[], int]:
    """Bursts and pauses."""
    rng = random.Random(6)
    return lambda: rng.choice((0, 0, 1, 3, 40))


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one way to run the requests against each alone."""

    way: str
    requests: int
    tokens: int
    differing_requests: int
    differing_tokens: int
    preemptions: int
    seconds: float


def compare(way: str, alone: Texts, got: Texts, skipped: dict[str, int], preemptions: int, began: float) -> Difference:
    """`got[i]` begins with the token `skipped[i]` of the answer."""
    wrong = tokens = requests = 0
    for name, text in got.items():
        expected = alone[name][skipped.get(name, 0) :]
        if len(text) != len(expected):
            raise SystemExit(f"{name}: {len(text)} tokens instead of {len(expected)}")
        here = sum(a != b for a, b in zip(text, expected, strict=True))
        wrong, tokens, requests = wrong + here, tokens + len(text), requests + (here > 0)
    found = Difference(way, len(got), tokens, requests, wrong, preemptions, time.perf_counter() - began)
    say(
        f"    {way}: {wrong} of {tokens} tokens in {requests} of {len(got)} requests differ; "
        f"{preemptions} preemptions, {found.seconds:.1f} s"
    )
    return found


def texts(rank: Rank, asked: list[EngineRequest]) -> list[Difference]:
    """Every way against alone."""
    began = time.perf_counter()
    alone = run_alone(rank, asked)
    found = [compare("alone", alone, alone, {}, 0, began)]
    began = time.perf_counter()
    got, preemptions = run(rank, asked, mixed())
    found.append(compare("mixed", alone, got, {}, preemptions, began))
    rng, resumed = random.Random(7), []
    for one in asked:
        emitted = alone[one.id][: rng.randrange(1, max(2, len(alone[one.id])))]
        resumed.append(replace(one, resumed_ids=tuple(emitted)))
    resumed = [one for one in resumed if len(one.resumed_ids) < one.sampling.max_tokens]
    began = time.perf_counter()
    got, preemptions = run(rank, resumed, mixed())
    skipped = {one.id: len(one.resumed_ids) for one in resumed}
    found.append(compare("replayed", alone, got, skipped, preemptions, began))
    return found


@torch.inference_mode()
def products(repeat: int = 10) -> list[dict[str, Any]]:
    """Both products, in turn."""
    rows: list[dict[str, Any]] = []
    for name, (outputs, inputs) in WEIGHTS.items():
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") / 64
        for tokens in TOKENS:
            if name == "head" and tokens > 1024:
                continue
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
            ours = timed(partial(invariant_linear, x, weight), repeat)
            theirs = timed(partial(linear, x, weight), repeat)
            error = (invariant_linear(x, weight).float() - F.linear(x, weight).float()).abs().max().item()
            rows.append({"weight": name, "tokens": tokens, "invariant_us": ours, "plain_us": theirs, "error": error})
            rate, bandwidth = 2 * tokens * outputs * inputs / ours / 1e6, 2 * outputs * inputs / ours / 1e3
            say(
                f"    {name} {tokens}: {ours:.1f} us ({rate:.0f} TFLOP/s, {bandwidth:.0f} GB/s), "
                f"plain {theirs:.1f} us: {ours / theirs:.2f} times; differ by {error:.3g}"
            )
    return rows


def timed(call: Callable[[], object], repeat: int) -> float:
    """Microseconds of one call among many, after two that warm up. Weights of more than 50 MB are read from memory."""
    call(), call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / repeat


def cost(rank: Rank, name: str, requests: int, repeat: int) -> list[float]:
    """Output tokens a second of a workload, all at once; the first run, of fewer requests, warms up."""
    rates = []
    for rep in range(repeat + 1):
        work = make_work(name, rep=rep, divide=1, vocab=rank.vocab_size)[: requests or None]
        if rep == 0:
            work = work[:16]
        asked = [EngineRequest(str(i), w.prompt, SamplingParams(w.out, temperature=0.0)) for i, w in enumerate(work)]
        began = time.perf_counter()
        got, _ = run(rank, asked, lambda: 10**6, Rank.make_engine)
        rates.append(sum(map(len, got.values())) / (time.perf_counter() - began))
    return rates[1:]


def load(args: argparse.Namespace, *, on: bool, layers: int, **limits: Any) -> Rank:
    """A rank, its start told."""
    began = time.perf_counter()
    config = EngineConfig(batch_invariant=on, cuda_graphs=args.cuda_graphs, **limits)
    rank = load_rank(args.model, config, dtype=args.dtype, layers=layers)
    say(f"{'on' if on else 'off'}, {layers or 'all'} layers: started in {time.perf_counter() - began:.1f} s "
        f"({', '.join(f'{name} {seconds:.1f}' for name, seconds in rank.phases.items())})")  # fmt: skip
    return rank


def unload(rank: Rank) -> None:
    """Its memory is free."""
    rank.close()
    rank.__dict__.clear()
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="demo, a folder, or llama-8b (random weights)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layers", type=int, default=4, help="llama-8b: of the model whose texts are compared")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--contrast", type=int, default=200, help="requests with the mode off")
    parser.add_argument("--out", type=int, default=24, help="tokens of each")
    parser.add_argument("--divide", type=int, default=1, help="divide the lengths of the prompts")
    parser.add_argument("--num-blocks", type=int, default=500, help="of the pool: few, so that some are preempted")
    parser.add_argument("--products", action="store_true", help="time products (GPU)")
    parser.add_argument("--cost", nargs="*", default=[], choices=list(workloads.ALL), help="workloads to be timed")
    parser.add_argument("--cost-requests", type=int, default=0, help="only the first so many of each")
    parser.add_argument("--repeat", type=int, default=1, help="of the workloads")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    document: dict[str, Any] = {"device": where, "arguments": sys.argv[1:], "texts": {}, "cost": {}}

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")

    wrong = 0
    for on in (True, False):
        count = args.requests if on else args.contrast
        if not count:
            continue
        rank = load(args, on=on, layers=args.layers, max_num_seqs=256, max_num_batched_tokens=1024,
                    num_blocks=args.num_blocks)  # fmt: skip
        asked = make_requests(count, args.out, args.divide, rank.vocab_size)
        found = texts(rank, asked)
        document["texts"]["on" if on else "off"] = [asdict(one) for one in found]
        wrong += sum(one.differing_tokens for one in found) if on else 0
        unload(rank)
        write()
    if args.products:
        document["products"] = products()
        write()
    for on in (True, False) if args.cost else ():
        rank = load(args, on=on, layers=0, max_num_seqs=1000, max_num_batched_tokens=8192)
        for name in args.cost:
            rates = cost(rank, name, args.cost_requests, args.repeat)
            document["cost"].setdefault(name, {})["on" if on else "off"] = rates
            say(f"    {name}: {', '.join(f'{rate:.0f}' for rate in rates)} output tokens/s")
        unload(rank)
        write()
    for name, both in document["cost"].items():
        ratio = workloads.median(both["on"]) / workloads.median(both["off"])
        say(f"{name}: {ratio:.3f} of the tokens/s with the mode off")
    if wrong:
        raise SystemExit(f"{wrong} tokens differ with the mode on")


if __name__ == "__main__":
    main()
