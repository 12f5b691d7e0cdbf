"""Expected latency for users of plain Serve handles, on a deployment whose first replica is slow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

CALLS, AT_ONCE = 36, 3


def test_calls_by_handles_go_to_the_replica_that_is_done_first(cluster: Any, tmp_path: Path) -> None:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    class Worker:
        def __init__(self, folder: str) -> None:
            try:
                (Path(folder) / "slow").touch(exist_ok=False)
                self.name, self.seconds = "slow", 2.0  # more than three calls of the other take where all is slow
            except FileExistsError:
                self.name, self.seconds = "fast", 0.02

        async def __call__(self, prompt: str) -> str:
            await asyncio.sleep(self.seconds)
            return self.name

    class Caller:
        def __init__(self, workers: Any) -> None:
            self.workers = workers

        async def __call__(self) -> list[str]:
            names: list[str] = []
            for _ in range(CALLS // AT_ONCE):
                names += await asyncio.gather(*(self.workers.remote("a prompt") for _ in range(AT_ONCE)))
            return names

    workers = serve.deployment(
        Worker,
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class="cluster.request_router:ExpectedLatencyRouter",
            request_router_kwargs={"strategy": "min_expected_latency"},
        ),
    ).bind(str(tmp_path))
    caller = serve.deployment(Caller, ray_actor_options={"num_cpus": 0}).bind(workers)
    try:
        names = serve.run(caller, name="unlike", route_prefix=None).remote().result(timeout_s=100)
    finally:
        serve.delete("unlike")
    assert len(names) == CALLS
    assert {"fast", "slow"} == set(names), "each is tried"
    assert names.count("fast") > 2 / 3 * CALLS
