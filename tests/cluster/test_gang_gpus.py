"""Ranks of a gang see each other's GPUs, and each takes the one that Ray gave it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.environment import gpu_index
from cluster.placement import rank_options
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
GANG = ReplicaConfig(ModelConfig("path", "name"), EngineConfig(), tensor_parallel=2, device="cuda")


def test_only_gangs_on_gpus_see_all_of_them() -> None:
    assert rank_options(GANG)["runtime_env"]["env_vars"] == {NOSET: "1"}
    assert "runtime_env" not in rank_options(replace(GANG, tensor_parallel=1))
    assert "runtime_env" not in rank_options(replace(GANG, device="cpu"))


@pytest.mark.parametrize(
    ("visible", "name", "index"),
    [(None, "3", 3), ("", "1", 1), ("4,6", "6", 1), ("GPU-a,GPU-b", "GPU-a", 0), ("5", "5", 0)],
)
def test_the_index_of_what_ray_assigned(
    visible: str | None, name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_index(name) == index
