"""Every family on a GPU, in bf16 and in fp32, beside transformers on the same GPU.

    PYTHONPATH=. python tests/workers/family_on_gpu.py --json benchmarks/results/families-h100.json

Weights are numbers of bf16. `exact` are the logits of the reference in fp32 on the CPU. In fp32 ours may be off by
ATOL; in bf16 a row's error is |logits - exact| / |exact|, and its median over all rows may be SLACK times that of
transformers in bf16. That of the worst row may be WORST times as much, where no experts are chosen: a choice that
rounding turns moves a row by more than any bound that says anything. Families without a class in transformers may have
PLAIN in the median.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from family_cases import CASES, WAYS, checkpoint, config_of, implementation_of, logits, prompts
from safetensors.torch import load_file, save_file

from workers.layers.moe import Experts
from workers.models.base import read_config
from workers.models.registry import find
from workers.rank import Rank

ATOL = 5e-4
SLACK, WORST, ROOM = 1.5, 2.0, 0.003  # ROOM: added to a bound, for errors that are next to nothing
PLAIN = 0.03
Rows = dict[str, torch.Tensor]


@functools.cache
def rounded(name: str) -> Path:
    """The checkpoint of a case, every number one of bf16."""
    folder = checkpoint(name).with_name(f"{name}-rounded")
    shutil.copytree(checkpoint(name), folder)
    file = folder / "model.safetensors"
    tensors = {k: t.bfloat16().float() if t.is_floating_point() else t for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def reference(name: str, dtype: torch.dtype, device: str) -> Rows:
    """The logits of the reference, by way, fp32 on the CPU."""
    case, (long, short) = CASES[name], prompts(name)
    if callable(case.model):
        tensors = load_file(rounded(name) / "model.safetensors")
        whole, other = (case.model(case.config, tensors, torch.tensor(ids)) for ids in (long, short))
    else:
        model_class = getattr(transformers, f"{case.model}ForCausalLM")
        model = model_class.from_pretrained(rounded(name), dtype=dtype, attn_implementation=implementation_of(case))
        model.set_experts_implementation("eager")  # the others ask for channels in multiples of eight
        model = model.to(device).eval()
        whole, other = (model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in (long, short))
    ragged = torch.cat([whole[-1:], other]) if case.max_model_len is None else whole[-1:]
    return {"prefill": whole, "chunked": whole[:-3], "decode": whole[-3:], "ragged": ragged}


def ours(name: str, dtype: str, device: str) -> tuple[Rows, bool]:
    """Ours, fp32 on the CPU, and whether the model chooses experts. Kernels of other steps are not compiled."""
    config = config_of(name, rounded(name), 1)
    config = replace(config, device=device, model=replace(config.model, dtype=dtype))
    with patch.object(Rank, "_compile_kernels"):
        rank = Rank(config)
    found = {way: rows.float().cpu() for way, rows in logits(name, rank, *prompts(name)).items()}
    if CASES[name].max_model_len is not None:
        found["ragged"] = found["ragged"][:1]
    return found, any(isinstance(m, Experts) for m in rank.model.modules())


def errors(got: Rows, exact: Rows) -> dict[str, torch.Tensor]:
    """By way, of each row."""
    return {way: (got[way] - exact[way]).norm(dim=1) / exact[way].norm(dim=1) for way in WAYS}


def compare(name: str, dtype: str, device: str = "cuda") -> dict[str, Any]:
    """One case: what is off by how much, and `missed`, the bounds that it does not keep."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    config = read_config(rounded(name))
    exact = reference(name, torch.float32, "cpu")
    mine, mixed = ours(name, dtype, device)
    found: dict[str, Any] = {
        "case": name, "architecture": config["architectures"][0], "dtype": dtype, "device": device,
        "file": find(config).__module__.rpartition(".")[2] + ".py", "missed": [],
        "greatest_logit": max(float(rows.abs().max()) for rows in exact.values()),
        "greatest_difference": {way: float((mine[way] - exact[way]).abs().max()) for way in WAYS},
    }  # fmt: skip
    if dtype == "float32":
        found["missed"] = [way for way, value in found["greatest_difference"].items() if not value <= ATOL]
        return found | {"seconds": time.perf_counter() - began}
    error = errors(mine, exact)
    every = torch.cat(list(error.values()))
    found["row_error"] = {way: float(rows.median()) for way, rows in error.items()}
    found |= {"median_error": float(every.median()), "worst_error": float(every.max())}
    bounds = {"median_error": PLAIN}
    if not callable(CASES[name].model):
        theirs = reference(name, torch.bfloat16, device)
        of_theirs = torch.cat(list(errors(theirs, exact).values()))
        found["transformers"] = {"median_error": float(of_theirs.median()), "worst_error": float(of_theirs.max())}
        found["greatest_difference_from_transformers"] = {
            way: float((mine[way] - theirs[way]).abs().max()) for way in WAYS
        }
        bounds = {"median_error": SLACK * float(of_theirs.median()) + ROOM}
        if not mixed:
            bounds["worst_error"] = WORST * float(of_theirs.max()) + ROOM
    found["bounds"] = bounds
    found["missed"] = [what for what, bound in bounds.items() if not found[what] <= bound]
    return found | {"seconds": time.perf_counter() - began}


def attempt(name: str, dtype: str, device: str) -> dict[str, Any]:
    """`compare`, or the traceback of what went wrong."""
    try:
        return compare(name, dtype, device)
    except Exception:
        return {"case": name, "dtype": dtype, "missed": ["error"], "error": traceback.format_exc()}


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {found['case']} | {found['dtype']} | {found['error'].strip().splitlines()[-1][:150]} |"
    values = found["row_error"] if "row_error" in found else found["greatest_difference"]
    cells = [found["case"], found["architecture"], found["dtype"], *(f"{values[way]:.1e}" for way in WAYS)]
    if "row_error" in found:
        cells += [f"{found['median_error']:.1e}", f"{found['worst_error']:.1e}"]
        peer = found.get("transformers", {})
        cells += [f"{peer[key]:.1e}" if peer else "" for key in ("median_error", "worst_error")]
    return "| " + " | ".join([*cells, found["file"], ", ".join(found["missed"])]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=16, help="processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(attempt, name, dtype, args.device) for dtype in args.dtype for name in args.case]
        for done in as_completed(waiting):
            rows.append(done.result())
            print(line(rows[-1]), flush=True)
            if args.json:  # each time: what is there stays where the rest takes too long
                write(args.json, rows)
    if bad := [f"{row['case']} in {row['dtype']}" for row in rows if row["missed"]]:
        raise SystemExit("missed: " + ", ".join(bad))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All that was found so far, in the order of the cases."""
    order = list(CASES)
    document = {
        "command": " ".join(sys.argv), "torch": torch.__version__, "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "bounds": {"fp32": ATOL, "slack": SLACK, "worst": WORST, "room": ROOM, "plain": PLAIN},
        "cases": sorted(rows, key=lambda row: (row["dtype"], order.index(row["case"]))),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
