"""What each of two gloo processes runs in test_tensor_parallel.py. A module of its own: spawn imports it again."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import SamplingParams
from workers.context import ForwardContext, forward_context
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.parallel.group import Groups, connect, disconnect
from workers.rank import Rank

LENGTHS = (37, 5, 1)
STEPS = 6


def plans(prompts: list[tuple[int, ...]]) -> list[StepPlan]:
    """A prefill of all prompts (one greedy, two sampled), then decodes."""
    sampling = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=0.9, seed=11, top_p=0.9),
        SamplingParams(max_tokens=9, temperature=1.2, seed=12, presence_penalty=0.4),
    ]
    blocks = [(0, 1, 2), (5,), (9,)]
    added = tuple(
        NewSequence(i, ids, len(ids), s, b) for i, (ids, s, b) in enumerate(zip(prompts, sampling, blocks, strict=True))
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) > 1)
    first = tuple(ScheduledSequence(i, 0, len(prompts[i]), 1) for i in order)
    rest = [
        StepPlan(n, (), (), tuple(ScheduledSequence(i, len(ids) - 1 + n, 1, 1) for i, ids in enumerate(prompts)))
        for n in range(1, STEPS)
    ]
    return [StepPlan(0, (), added, first), *rest]


def run_plans(rank: Rank, prompts: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Logits of the last decode, and the tokens of all slots, as this rank has them."""
    runner = rank.runner
    todo = plans(prompts)
    for plan in todo[:-1]:
        runner.submit(plan).result()
    with torch.inference_mode():
        inputs = runner.state.prepare(todo[-1])
        with forward_context(ForwardContext((inputs.attention,) * len(runner.caches), runner.caches)):
            logits = rank.model.compute_logits(rank.model(inputs.input_ids, inputs.positions)).contiguous()
    runner.submit(todo[-1]).result()
    return {"logits": logits, "tokens": runner.state.token_table[: len(prompts), :64].clone()}


def run_without_memory(rank: Rank, prompts: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """As `run_plans`, where the other rank has memory for two tokens at a time, as it finds in the middle of a pass."""
    layer, found, cut = rank.model.get_submodule("model.layers.1.mlp"), 0, 0
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("planted")
        made: torch.Tensor = plain(x)
        return made

    if rank.rank:
        layer.forward = forward  # type: ignore[method-assign]
    for plan in plans(prompts):
        result = rank.runner.submit(plan).result()
        found, cut = found + 1, cut + result.cut
    layer.forward = plain  # type: ignore[method-assign]
    return {"tokens": rank.runner.state.token_table[: len(prompts), :64].clone(), "cut": torch.tensor([cut, found])}


def config(path: str, size: int, load_format: str) -> ReplicaConfig:
    """fp32 on the CPU with 16 blocks."""
    return ReplicaConfig(
        ModelConfig(path, "tiny", dtype="float32", load_format=load_format),
        EngineConfig(num_blocks=16, max_num_seqs=4),
        tensor_parallel=size,
        device="cpu",
    )


def main(rank: int, size: int, address: str, folders: list[str], out: str, prompts: list[tuple[int, ...]]) -> None:
    """Run every folder's model on this rank and write the results beside `out`."""
    torch.set_num_threads(1)
    groups = connect(rank=rank, tensor_parallel=size, init_method=address, timeout_seconds=60)
    results: dict[str, torch.Tensor] = {}
    for folder in folders:
        load_format = "dummy" if folder == folders[-1] else "safetensors"
        one = Rank(config(folder, size, load_format), rank=rank, groups=groups)
        for key, value in run_plans(one, prompts).items():
            results[f"{Path(folder).name}.{load_format}.{key}"] = value
        if folder == folders[0]:
            by_board = one.groups.tp.board is not None
            for key, value in run_without_memory(one, prompts).items():
                results[f"without.{key}"] = value
            results["without.votes"] = torch.tensor([by_board])
    gathered = groups.tp.all_gather(torch.full((2, 1), float(rank)))
    results["gathered"] = gathered
    results["reduced"] = groups.tp.all_reduce(torch.tensor([1.0, float(rank)]))
    groups.tp.barrier()
    groups.set_timeout(0.2)
    if rank == 0:  # the other one does not come
        results["late"] = torch.tensor(_message_of_a_late_collective(groups))
    save_file(results, f"{out}.{rank}")
    deadline = time.monotonic() + 60
    while rank > 0 and not Path(f"{out}.0").exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # its end would be noticed too, but otherwise
    disconnect()


def _message_of_a_late_collective(groups: Groups) -> list[int]:
    try:
        groups.tp.all_reduce(torch.zeros(1))
    except RuntimeError as e:
        return list(str(e).encode())
    return []


if __name__ == "__main__":
    sys.exit("imported by test_tensor_parallel.py only")
