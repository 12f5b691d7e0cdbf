"""What a replica's placement group looks like: one bundle a rank."""

from __future__ import annotations

from typing import Any

from workers.api.config import ReplicaConfig


def rank_bundles(config: ReplicaConfig) -> list[dict[str, float]]:
    """One bundle for each rank, in rank order. `config.device` is resolved (cpu or cuda)."""
    bundle: dict[str, float] = {"CPU": 1.0}
    if config.device == "cuda":
        bundle["GPU"] = 1.0
    return [dict(bundle) for _ in range(config.tensor_parallel)]


def rank_options(config: ReplicaConfig) -> dict[str, Any]:
    """Options of a rank's actor; `run` holds one of its two threads, `stop` needs the other."""
    return {
        "num_cpus": 1,
        "num_gpus": 1 if config.device == "cuda" else 0,
        "max_restarts": 0,
        "max_concurrency": 2,
    }
