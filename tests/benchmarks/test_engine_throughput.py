"""What `engine_throughput.py` times is called as it expects, and adds up."""

from __future__ import annotations

from engine_throughput import run_ours
from load.engine_target import load_rank
from load.work import Work

from workers.api.config import EngineConfig


def test_the_parts_of_a_run_are_found_and_lie_within_it() -> None:
    rank = load_rank("demo", EngineConfig(max_num_seqs=8, max_num_batched_tokens=64), threads=1)
    work = [Work(tuple(range(10 + i, 30 + i)), 5) for i in range(4)]
    run = run_ours(rank, work)
    rank.close()
    assert run.output_tokens == 20
    wall = {name: seconds for name, (seconds, _) in run.parts.items()}
    assert all(wall[name] > 0 for name in ("engine", "plan", "commit", "inputs", "sampling", "results", "model"))
    assert wall["engine"] + sum(wall[n] for n in ("inputs", "sampling", "results", "model")) <= run.seconds
