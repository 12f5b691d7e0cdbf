"""From starting a process to its first token: where the seconds go, with a cold kernel cache and with a warm one.

    python benchmarks/startup.py [--json FILE]            # one GPU: a checkpoint of the 8B Llama shape is made first
    python benchmarks/startup.py --model demo --repeat 2  # CPU

The checkpoint holds random weights in bf16, in safetensors files on local disk, and lies in the page cache once it is
written. Each start is a process of its own: Python and imports, the phases that `Rank` accounts for, an engine, and one
prompt of 128 tokens to its first token. What these leave of the wall time, by the clock of the process that starts it,
is unaccounted for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = "ECHELON_BENCHMARK_BEGAN"  # when the process was started, by time.time
PROMPT = 128
SHARD = 4 << 30  # bytes of a file


def child(model: str) -> None:
    """One start; prints seconds by phase and when the token was there."""
    phases = {"python": time.time() - float(os.environ[BEGAN])}
    began = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        phases[name], began = now - began, now

    from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
    from workers.api.request import EngineRequest, SamplingParams
    from workers.rank import Rank

    phase("imports")
    rank = Rank(ReplicaConfig(ModelConfig(model, "model"), EngineConfig()))
    phases |= rank.phases
    began = time.perf_counter()
    engine = rank.make_engine()
    engine.submit(EngineRequest("0", tuple(range(10, 10 + PROMPT)), SamplingParams(1, temperature=0.0)))
    phase("engine")
    tokens = [token for _ in iter(lambda: engine.has_work, False) for d in engine.step() for token in d.token_ids]
    assert len(tokens) == 1
    phase("first token")
    print(json.dumps({"phases": phases, "at": time.time()}), flush=True)


def start(model: str, kernels: Path) -> dict[str, Any]:
    """Seconds by phase of one process, in all, and what they leave."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels), BEGAN: repr(began := time.time())}
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--child"], env=environment, stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["at"] - began
    return {"seconds": seconds, "phases": found["phases"], "accounted": sum(found["phases"].values()) / seconds}


def make_checkpoint(folder: Path) -> float:
    """The 8B Llama shape with random weights; returns the seconds that it took."""
    import torch
    import workloads
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    began = time.perf_counter()
    (folder / "config.json").write_text(json.dumps(workloads.CONFIG))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}

    def put_away() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    torch.manual_seed(0)
    for name, like in model.state_dict().items():
        drawn = torch.empty(like.shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, 0.02)
        shard[name] = (drawn.fill_(1.0) if name.endswith("norm.weight") else drawn).cpu()
        if sum(t.nbytes for t in shard.values()) > SHARD:
            put_away()
    put_away()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return time.perf_counter() - began


def report(title: str, one: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one["phases"].items())
    print(f"{title}: {one['seconds']:.2f} s, {100 * one['accounted']:.2f} % accounted for: {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder, or demo; by default one is made")
    parser.add_argument("--repeat", type=int, default=3, help="starts with a warm cache")
    parser.add_argument("--child", action="store_true", help="be the process that is started")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.model)
        return
    from load.engine_target import folder_of

    scratch = Path(tempfile.mkdtemp(prefix="start-up-"))
    try:
        model, made = str(folder_of(args.model)) if args.model else str(scratch), 0.0
        if args.model is None:
            made = make_checkpoint(scratch)
            print(f"checkpoint written in {made:.1f} s", flush=True)
        starts = []
        for number in range(args.repeat + 1):
            starts.append(start(model, scratch / "kernels"))
            report(f"warm {number} of {args.repeat}" if number else "cold", starts[-1])
        if args.json:
            from load.records import versions

            text = json.dumps({"command": " ".join(sys.argv), "versions": versions(), "starts": starts}, indent=1)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(text + "\n")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
