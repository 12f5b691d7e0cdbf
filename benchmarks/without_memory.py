"""A gang of two GPUs while a neighbour takes the memory of one: the same tokens, steps cut, and what good steps cost.

    python benchmarks/without_memory.py --json FILE     # two GPUs
    python benchmarks/without_memory.py --small         # CPUs and gloo; the second rank's address space is limited

First long prompts in fp32, alone, then with a neighbour on the second GPU that leaves so many MiB, then alone again.
Then the 8B Llama shape in bf16 (random weights): milliseconds a step where ranks see to steps without memory, and where
they do not, in turns; medians of the rounds, least and greatest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workloads
from load.ranks import run_together

LEFT_MIB, SMALL_LEFT_MIB = (400, 120), (12, 3)
LONG, PROMPTS, OUT = 3500, 6, 8  # tokens of a prompt, prompts, tokens drawn
ROUNDS, STEPS = 5, 60
SHAPES = {
    "tokens": {
        **workloads.CONFIG,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "num_hidden_layers": 4,
    },
    "time": workloads.CONFIG,
}
SMALL = {
    **workloads.CONFIG,
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
NEIGHBOUR = """
import sys, torch
torch.cuda.set_device(1)
torch.zeros(1, device="cuda")
kept = torch.empty(torch.cuda.mem_get_info()[0] - (int(sys.argv[1]) << 20), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""
TOLD = -7  # the step of a message that is not a plan's


@contextmanager
def neighbour(left: int, *, really: bool) -> Iterator[None]:
    """Another process has all memory of the second GPU but `left` MiB."""
    if not really:
        yield
        return
    with subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "taken":
            raise SystemExit("the neighbour took no memory")
        yield
        process.communicate("")


def run_rank(args: argparse.Namespace) -> None:
    """One rank to its end; rank 0 measures and writes figures to --json."""
    import torch

    from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
    from workers.engine.plan import StepMasks
    from workers.execution.gang import GangExecutor, follow
    from workers.parallel.channel import PlanReceiver, PlanSender
    from workers.parallel.group import connect, disconnect
    from workers.rank import Rank

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    folder = Path(args.meet)
    if args.small:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(args.rank)
    dtype = "float32" if args.small or args.what == "tokens" else "bfloat16"
    model = ModelConfig(str(folder), args.what, load_format="dummy", dtype=dtype)
    groups = connect(
        rank=args.rank, tensor_parallel=2, init_method=f"file://{folder}/meet", backend="gloo" if args.small else "nccl"
    )
    sender = PlanSender("127.0.0.1", 1) if args.rank == 0 else None
    if sender is not None:
        (folder / "draft").write_text(json.dumps([*sender.address, sender.secret]))
        (folder / "draft").rename(folder / "plans")
    blocks = 400 if args.small else 4000
    engine = EngineConfig(max_num_seqs=32, max_num_batched_tokens=8192, num_blocks=blocks, prefix_caching=False)
    device = "cpu" if args.small else "cuda"
    rank = Rank(ReplicaConfig(model, engine, tensor_parallel=2, device=device), rank=args.rank, groups=groups)

    def told(careful: bool, left: int) -> None:
        rank.runner.passes.careful = careful
        if args.small:
            if args.rank:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + (left << 20) if left else -1, -1))
        else:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    if sender is None:
        while not (folder / "plans").exists():
            time.sleep(0.02)
        host, port, secret = json.loads((folder / "plans").read_text())
        receiver = PlanReceiver((host, port), secret, "rank 1")
        plain = receiver.receive

        def receive() -> Any:
            while isinstance(plan := plain(), StepMasks) and plan.step == TOLD:
                told(bool(plan.slots[0]), plan.slots[1])
            return plan

        receiver.receive = receive  # type: ignore[method-assign]
        follow(rank.runner, receiver)
    else:
        sender.accept()

        def tell(careful: bool, left: int = 0) -> None:
            sender.send(StepMasks(TOLD, (int(careful), left), b""))
            told(careful, left)

        executor = GangExecutor(rank.runner, sender)
        found = (tokens if args.what == "tokens" else times)(rank, executor, tell, small=args.small)
        args.json.write_text(json.dumps(found))
        sender.close()
    rank.close()
    disconnect()


def tokens(rank: Any, executor: Any, tell: Any, *, small: bool) -> dict[str, Any]:
    """Tokens of long prompts beside a neighbour, against those of a gang alone."""
    from workers.api.request import EngineRequest, SamplingParams
    from workers.rank import run_to_completion

    vocab = rank.vocab_size
    length = 600 if small else LONG
    asked = [
        EngineRequest(
            str(n), tuple((7 * n + 131 * i + i * i) % (vocab - 10) for i in range(length - 17 * n)),
            SamplingParams(OUT, temperature=0.0 if n % 2 else 0.7, seed=n),
        )
        for n in range(PROMPTS)
    ]  # fmt: skip

    def run(left: int = 0) -> tuple[dict[str, list[int]], int, float]:
        tell(careful=True, left=left)
        engine, began = rank.make_engine(executor), time.perf_counter()
        made = run_to_completion(engine, asked)
        engine.check_ledgers()
        return made, engine.stats.steps_cut, time.perf_counter() - began

    run()
    expected, uncut, alone = run()
    rows = [{"left_MiB": None, "cut": uncut, "seconds": alone, "equal": True}]
    for left in SMALL_LEFT_MIB if small else LEFT_MIB:
        tell(careful=True)
        time.sleep(0.5)
        with neighbour(left, really=not small):
            made, cut, seconds = run(left if small else 0)
        rows.append({"left_MiB": left, "cut": cut, "seconds": seconds, "equal": made == expected})
        print(rows[-1], flush=True)
    made, cut, seconds = run()
    rows.append({"left_MiB": None, "cut": cut, "seconds": seconds, "equal": made == expected})
    return {"tokens": rows}


def times(rank: Any, executor: Any, tell: Any, *, small: bool) -> dict[str, Any]:
    """Milliseconds a step, with votes and without, in turns."""
    from workers.api.request import EngineRequest, SamplingParams

    vocab = rank.vocab_size

    def decodes(batch: int, temperature: float) -> float:
        engine = rank.make_engine(executor)
        for n in range(batch):
            ids = tuple((7 * n + 131 * i) % (vocab - 10) for i in range(32))
            engine.submit(EngineRequest(str(n), ids, SamplingParams(STEPS + 20, temperature=temperature, seed=n)))
        for _ in range(10):
            engine.step()
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        seconds = time.perf_counter() - began
        while engine.has_work:
            engine.step()
        return 1e3 * seconds / STEPS

    def prompts(count: int, length: int) -> float:
        engine = rank.make_engine(executor)
        for n in range(count):
            ids = tuple((11 * n + 131 * i) % (vocab - 10) for i in range(length))
            engine.submit(EngineRequest(str(n), ids, SamplingParams(1, temperature=0.0)))
        began, steps = time.perf_counter(), 0
        while engine.has_work:
            engine.step()
            steps += 1
        return 1e3 * (time.perf_counter() - began) / steps

    length = 200 if small else 2000
    cases = {
        "1 greedy decode": lambda: decodes(1, 0.0),
        "16 greedy decodes": lambda: decodes(16, 0.0),
        "1 drawn decode": lambda: decodes(1, 0.8),
        "16 drawn decodes": lambda: decodes(16, 0.8),
        "prompts, 8192 tokens a step": lambda: prompts(8, length),
    }
    found: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in cases}
    for number in range(ROUNDS + 1):
        for careful in (True, False) if number % 2 else (False, True):
            tell(careful)
            for name, case in cases.items():
                milliseconds = case()
                if number:
                    found[name][careful].append(milliseconds)
    rows = {}
    for name, both in found.items():
        ratios = [a / b for a, b in zip(both[True], both[False], strict=True)]
        rows[name] = {
            "ms with": spread(both[True]), "ms without": spread(both[False]), "ratio": spread(ratios),
        }  # fmt: skip
    return {"times": rows}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small shape, on CPUs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--what", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        (args.what,) = args.what
        run_rank(args)
        return
    if args.small:  # what is large is mapped and unmapped each time, so that the limit is felt
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    measured: dict[str, Any] = {}
    for what in args.what:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(SMALL if args.small else SHAPES[what]))
            command = [sys.executable, __file__, "--what", what, "--meet", name, "--json", f"{name}/figures.json"]
            command += ["--small"] if args.small else []
            codes = run_together([[*command, "--rank", str(rank)] for rank in range(2)])
            if any(codes):
                raise SystemExit(f"{what}: the ranks ended with {codes}")
            measured.update(json.loads((folder / "figures.json").read_text()))
    for row in measured.get("tokens", ()):
        print(row)
    for name, row in measured.get("times", {}).items():
        print(f"{name}: {row}")
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
