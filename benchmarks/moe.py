"""Mixtures of experts on one GPU: an 8x7B shape and DeepSeek-MoE's, beside transformers, with the floor of a step.

    python benchmarks/moe.py --json benchmarks/results/moe-h200.json     # one GPU, about 2 minutes
    python benchmarks/moe.py --profile --peer-repeat 0 --repeat 1        # and where the time of our steps goes
    python benchmarks/moe.py --small                                     # CPU: tiny models of the same two families

Random weights in bf16, --batch requests at once of 128 tokens in and --out out. Of the 8x7B shape as many layers as fit
into the device (20 of 32 into 80 GB). Each engine has a process of its own and all of the device's memory; all are
started at once and take turns at the device; who runs when --seconds are over is ended, and what was found is kept.

transformers runs `generate` over one batch, with its grouped products of experts; at batch 1 it decodes with batched
ones, which copy the chosen experts: at larger batches there is no memory for that. It has no class of DeepSeek-MoE, so
it gets Qwen2-MoE in the same shape, whose shared experts have a gate of one channel more.

The floor of a decode step is what it reads, over the bandwidth of a copy: all weights but the embedding's and those of
experts that no token chose (counted in a run of short prompts without graphs), and the keys and values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from load.goals import COPY
from load.records import complain, make_console, summary, versions
from load.work import Pacing, Work, fixed_work

PROMPT, SHORT_PROMPT = 128, 8
OURS, PEER = "echelon", "transformers"
LLAMA = {"hidden_act": "silu", "max_position_embeddings": 1024, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False}  # fmt: skip
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "num_hidden_layers": 32,
}  # fmt: skip
MIXTRAL_LAYERS_80GB = 20
FINE = {
    **LLAMA, "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 28, "num_experts_per_tok": 6,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "norm_topk_prob": False,
}  # fmt: skip
DEEPSEEK = {
    **FINE, "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "n_routed_experts": 64,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "softmax",
}  # fmt: skip
QWEN = {
    **FINE, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 64,
    "shared_expert_intermediate_size": 2 * 1408, "mlp_only_layers": [0], "decoder_sparse_step": 1, "qkv_bias": False,
}  # fmt: skip
SHAPES = {"mixtral-8x7b": {OURS: MIXTRAL, PEER: MIXTRAL}, "deepseek-moe-16b": {OURS: DEEPSEEK, PEER: QWEN}}
SMALL = {"vocab_size": 301, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 2}  # fmt: skip
SMALL_INNER = {"intermediate_size": 96, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}


def config_of(shape: str, who: str, *, small: bool) -> dict[str, Any]:
    """The config.json of a shape."""
    config = SHAPES[shape][who]
    if small:
        return {**config, **SMALL, **{k: v for k, v in SMALL_INNER.items() if k in config}}
    import torch

    roomy = torch.cuda.get_device_properties(0).total_memory > 120e9
    return dict(config) if roomy or shape != "mixtral-8x7b" else {**config, "num_hidden_layers": MIXTRAL_LAYERS_80GB}


def step_bytes(rank: Any, active: float, batch: int, context: float) -> dict[str, float]:
    """What a decode step reads: weights of all tokens, of `active` experts a layer, keys and values."""
    from workers.layers.moe import Experts

    mixtures = [m for m in rank.model.modules() if isinstance(m, Experts)]
    of_experts = sum(p.nbytes for m in mixtures for p in m.parameters())
    embedding = rank.model.model.embed_tokens.weight.nbytes
    rest = sum(p.nbytes for p in rank.model.parameters()) - of_experts - embedding
    cached = sum(cache.key[0, 0].nbytes + cache.value[0, 0].nbytes for cache in rank.runner.caches)
    return {
        "weights_of_all": rest,
        "weights_of_chosen_experts": of_experts * active / mixtures[0].count,
        "keys_and_values": cached * batch * context,
    }


def active_experts(rank: Any, work: list[Work]) -> float:
    """Experts that at least one token of a decode step goes to, a mean over layers and steps."""
    from workers.api.request import EngineRequest, SamplingParams
    from workers.layers.moe import Router
    from workers.rank import run_to_completion

    seen: list[int] = []

    def look(_module: object, _args: object, chosen: tuple[Any, Any]) -> None:
        if len(chosen[0]) == len(work):
            seen.append(len(chosen[0].unique()))

    hooks = [m.register_forward_hook(look) for m in rank.model.modules() if isinstance(m, Router)]
    passes = rank.runner.passes
    graphs, passes.graphs = passes.graphs, None
    params = SamplingParams(6, temperature=0.0)
    run_to_completion(rank.make_engine(), [EngineRequest(str(i), w.prompt, params) for i, w in enumerate(work)])
    passes.graphs = graphs
    for hook in hooks:
        hook.remove()
    return statistics.fmean(seen)


def ours(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures by batch, with floors: what is known so far, after each."""
    from load.engine_target import EngineTarget, load_rank

    from workers.api.config import EngineConfig

    limits = EngineConfig(max_num_seqs=max(args.batch), max_num_batched_tokens=256 if args.small else 8192)
    rank = load_rank(str(folder), limits, random=True, threads=1 if args.small else None)
    found: dict[str, Any] = {"load_seconds_by_phase": rank.phases, "kv_blocks": rank.num_blocks,
                             "graphs": rank.runner.passes.graphs is not None, "batches": {}}  # fmt: skip
    bandwidth = bandwidth_of(rank.device.type)
    found["copy_GB_per_s"] = bandwidth
    for batch in args.batch:
        rows = measured(EngineTarget(rank), batch, rank.vocab_size, args, repeat=args.repeat)
        work = fixed_work(batch, SHORT_PROMPT, args.out, vocab=rank.vocab_size, rep=99)
        active = active_experts(rank, work)
        parts = step_bytes(rank, active, batch, PROMPT + args.out / 2)
        floor = 1e-6 * sum(parts.values()) / bandwidth if bandwidth else 0.0
        found["batches"][batch] = {"figures": rows, "active_experts": active, "bytes_a_step": parts, "floor_ms": floor}
        say(f"batch {batch}: {rows['output_tok_per_s']['median']:,.0f} output tok/s, step "
            f"{rows['itl_ms_p50']['median']:.2f} ms, floor {floor:.2f}, {active:.1f} experts")  # fmt: skip
        yield found
    if args.profile:
        found["profile"] = {batch: profile(rank, batch) for batch in args.batch}
        yield found


def profile(rank: Any, batch: int) -> dict[str, float]:
    """Prints the kernels of our decode steps by their share."""
    from step_profile import decodes, report

    print(f"{batch} decodes", flush=True)
    device, _, steps = decodes(rank.make_engine(), batch, 20, 0)
    return report(device, steps, 24)


def theirs(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same of transformers, without floors."""
    import torch
    from load.transformers_target import GenerateTarget, load_model

    dtype, device = (torch.float32, "cpu") if args.small else (torch.bfloat16, "cuda")
    model = load_model(folder, dtype=dtype, device=torch.device(device), random=True)
    found: dict[str, Any] = {
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
        "batches": {},
    }
    for batch in args.batch:
        if batch > 1:
            model._optimize_model_for_decode = contextlib.nullcontext  # stays with the grouped products
        rows = measured(GenerateTarget(model), batch, model.config.vocab_size, args, repeat=args.peer_repeat)
        found["batches"][batch] = {"figures": rows}
        say(f"batch {batch}: {rows['output_tok_per_s']['median']:,.0f} output tok/s")
        yield found


def measured(target: Any, batch: int, vocab: int, args: argparse.Namespace, *, repeat: int) -> dict[str, Any]:
    """Figures over `repeat` runs with fresh prompts, after a short one that warms up."""
    runs = []
    for rep in range(repeat + 1):
        work = fixed_work(batch, PROMPT, args.out if rep else 2, vocab=vocab, rep=rep)
        runs.append(target.run(work, Pacing(concurrency=batch), lambda: None))
        complain(runs[-1:])
    return summary(runs[1:])


def bandwidth_of(device: str) -> float:
    """GB/s of a copy, 0 on a CPU."""
    if device == "cpu":
        return 0.0
    import torch
    from ceilings import measure

    found = measure()
    torch.cuda.empty_cache()
    return found[COPY]


def say(text: str) -> None:
    """A line, at once."""
    print(f"  {time.perf_counter() - BEGAN:6.1f} s  {text}", flush=True)


def wait_for_turn(file: Path, number: int) -> None:
    """Until those before have left the device. Packages are imported meanwhile."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    while file.read_text() != str(number):
        time.sleep(0.1)


def one(args: argparse.Namespace) -> None:
    """One shape on one engine, in this process."""
    shape, who = args.only.split("/")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_of(shape, who, small=args.small)))
        wait_for_turn(args.turn, args.number)
        say(args.only)
        for found in (ours if who == OURS else theirs)(folder, args):
            args.json.write_text(json.dumps(found))


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--out", type=int, default=32, help="tokens out")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-repeat", type=int, default=1, help="of transformers; 0: leave it away")
    parser.add_argument("--profile", action="store_true", help="trace decode steps of ours (CUDA)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="SHAPE/ENGINE, in this process, figures to --json")
    parser.add_argument("--turn", type=Path, help="with --only: the file that says whose turn it is")
    parser.add_argument("--number", type=int, default=0, help="with --only: the turn of this process")
    return parser.parse_args(given)


def main() -> None:
    args = parsed()
    if args.only:
        one(args)
        return
    with tempfile.TemporaryDirectory() as name:
        found, bad = in_turns(Path(name), args)
    show(found)
    if bad:
        raise SystemExit(f"failed or not finished: {', '.join(bad)}")


def everybody(args: argparse.Namespace) -> list[str]:
    """All turns, ours first."""
    return [f"{shape}/{who}" for who in (OURS, PEER) if who == OURS or args.peer_repeat for shape in args.shape]


def keep(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what is there so far."""
    if args.json is None:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": " ".join(sys.argv), "versions": versions(), "device": device_name(), "prompt": PROMPT,
                "out": args.out}  # fmt: skip
    configs = {shape: config_of(shape, OURS, small=args.small) for shape in args.shape}
    args.json.write_text(json.dumps({**document, "configs": configs, "measured": found}, indent=1) + "\n")


def device_name() -> str:
    """The GPU's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def in_turns(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What each process found, and those that failed or were ended."""
    turns = folder / "turn"
    turns.write_text("0")
    command = [sys.executable, __file__, "--batch", *map(str, args.batch), "--out", str(args.out)]
    command += ["--repeat", str(args.repeat), "--peer-repeat", str(args.peer_repeat), "--turn", str(turns)]
    command += [flag for flag, on in (("--small", args.small), ("--profile", args.profile)) if on]
    running = {}
    for number, who in enumerate(everybody(args)):
        more = ["--only", who, "--number", str(number), "--json", str(folder / f"{number}.json")]
        running[who] = subprocess.Popen([*command, *more])
    found: dict[str, Any] = {}
    bad: list[str] = []
    for number, (who, process) in enumerate(running.items()):
        try:
            process.wait(timeout=max(0.1, args.seconds - (time.perf_counter() - BEGAN)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode:
            bad.append(who)
        if (file := folder / f"{number}.json").exists():
            found[who] = json.loads(file.read_text())
            keep(found, args)
        turns.write_text(str(number + 1))
    return found, bad


def show(found: dict[str, Any]) -> None:
    """One line a shape and batch."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "batch", "output tok/s", "step ms", "floor ms", "of the floor", PEER, f"times {PEER}"):
        table.add_column(title, justify="right" if title else "left")
    for who, facts in found.items():
        shape, engine = who.split("/")
        if engine != OURS:
            continue
        peer = found.get(f"{shape}/{PEER}", {"batches": {}})["batches"]
        for batch, row in facts["batches"].items():
            mine, step = (row["figures"][name]["median"] for name in ("output_tok_per_s", "itl_ms_p50"))
            cells = [f"{mine:,.0f}", f"{step:.2f}", f"{row['floor_ms']:.2f}", f"{row['floor_ms'] / step:.2f}"]
            if batch in peer:
                other = peer[batch]["figures"]["output_tok_per_s"]["median"]
                cells += [f"{other:,.0f}", f"{mine / other:.1f}"]
            table.add_row(shape, str(batch), *cells)
    make_console().print(table)


BEGAN = time.perf_counter()

if __name__ == "__main__":
    main()
