"""What each of two processes, one a GPU, runs in test_two_gpus.py. A module of its own: spawn imports it again."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "workers"))  # the demo model's prompts
from demo_reference import FOLDER
from demo_requests import Answer, requests, serve

from kernels.all_reduce import all_reduce_reference
from kernels.norms import add_rms_norm
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.execution.gang import GangExecutor, follow
from workers.execution.graphs import CapturedStep
from workers.parallel.channel import PlanReceiver, PlanSender
from workers.parallel.group import Groups, connect, disconnect
from workers.parallel.peer_memory import share_memory
from workers.rank import Rank

COUNT = 60
ROWS = (1, 2, 15, 16, 17, 64, 333, 1024, 1025, 2500)
WIDTHS = ((4096, torch.bfloat16), (5120, torch.float16), (1000, torch.float32), (6, torch.float32))
WAYS = {
    "graphs, peer memory": (True, True),
    "graphs, NCCL": (True, False),
    "launched, peer memory": (False, True),
    "launched, NCCL": (False, False),
}


def sums(groups: Groups, device: torch.device) -> dict[str, Any]:
    """Sums of all sizes against torch's, bit for bit: names of those that differ, and a hash of what the norms made."""
    group = share_memory(groups.tp, device)
    assert group.exchange is not None, "these GPUs do not reach each other's memory"
    random = torch.Generator(device).manual_seed(3)
    wrong, hashes = [], []
    for channels, dtype in WIDTHS:
        weight = torch.randn(channels, generator=random, device=device).to(dtype)
        for rows in (*ROWS, *reversed(ROWS)):
            parts = [torch.randn(rows, channels, generator=random, device=device).to(dtype) for _ in range(2)]
            rest = torch.randn(rows, channels, generator=random, device=device).to(dtype)
            exact = all_reduce_reference(parts)
            assert group.exchange.takes(parts[0])
            normed, total = group.add_rms_norm(parts[group.rank], rest, weight, 1e-5)
            expected = add_rms_norm(exact, rest, weight, 1e-5)
            summed = group.all_reduce(parts[group.rank].clone())
            near = torch.allclose(normed.float(), expected[0].float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
            if not (torch.equal(summed, exact) and torch.equal(total, expected[1]) and near):
                wrong.append(f"{rows} x {channels} {dtype}")
            hashes.append(hashlib.blake2b(normed.view(torch.uint8).cpu().numpy()).hexdigest())
    return {"wrong": wrong, "hashes": hashes, "replayed": replayed(group, device)}


def replayed(group: Any, device: torch.device) -> list[str]:
    """The same out of a CUDA graph of an odd number of sums, replayed among others."""
    x = torch.zeros(8, 4096, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(x)

    def thrice() -> None:
        y = x.clone()
        for _ in range(3):
            group.all_reduce(y)
        out.copy_(y)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        thrice()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        thrice()
        graph.capture_end()
    stream.synchronize()
    wrong = []
    for turn in range(200):
        x.fill_(turn + group.rank)
        graph.replay()
        beside = group.all_reduce(torch.full((turn % 24 + 1, 4096), 1.0, dtype=torch.bfloat16, device=device))
        first = torch.tensor(turn + turn + 1.0, device=device).bfloat16()
        if not (bool((out == (first + first) + (first + first)).all()) and bool((beside == 2.0).all())):
            wrong.append(f"turn {turn}")
    return wrong


def answers(groups: Groups, number: int, plans: Path, *, graphs: bool, peers: bool) -> tuple[dict[str, Answer], int]:
    """What the demo model says in fp32 over both ranks, on rank 0; and how many steps were replayed here."""
    engine = EngineConfig(num_blocks=4096, max_num_seqs=64, cuda_graphs=graphs)
    model = ModelConfig(str(FOLDER), "demo", dtype="float32")
    config = ReplicaConfig(model, engine, tensor_parallel=2, device="cuda")
    rank = Rank(config, rank=number, groups=groups, peer_memory=peers)
    replays, replay = 0, CapturedStep.replay

    def counting(self: CapturedStep, flat: Any) -> None:
        nonlocal replays
        replays += 1
        replay(self, flat)

    CapturedStep.replay = counting  # type: ignore[method-assign]
    try:
        if number > 0:
            while not plans.exists():
                time.sleep(0.01)
            host, port, secret = json.loads(plans.read_text())
            follow(rank.runner, PlanReceiver((host, port), secret))
            return {}, replays
        sender = PlanSender("127.0.0.1", 1)
        plans.with_suffix(".draft").write_text(json.dumps([*sender.address, sender.secret]))
        plans.with_suffix(".draft").rename(plans)
        sender.accept()
        found = serve(rank.make_engine(GangExecutor(rank.runner, sender)), requests(COUNT))
        sender.close()
        return found, replays
    finally:
        CapturedStep.replay = replay  # type: ignore[method-assign]
        rank.close()


def main(number: int, folder: str) -> None:
    """Run everything on this rank; the results go to `folder`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(number)
    groups = connect(rank=number, tensor_parallel=2, init_method=f"file://{folder}/meet", backend="nccl")
    results: dict[str, Any] = {"sums": sums(groups, torch.device("cuda", number))}
    for turn, (way, (graphs, peers)) in enumerate(WAYS.items()):
        found, replays = answers(groups, number, Path(folder) / f"plans{turn}.json", graphs=graphs, peers=peers)
        results[way] = {"tokens": {name: one.tokens for name, one in found.items()}, "replays": replays}
    Path(folder, f"found{number}.json").write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    sys.exit("imported by test_two_gpus.py only")
