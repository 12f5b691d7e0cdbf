"""The same replicas behind Ray Serve's own default router: a deployment that is called by a plain `DeploymentHandle`.

Each of its replicas is a door to one engine. The handle's router, in the caller's process, sends a call to the door
with the fewer calls under way, of two drawn by chance. Dispatcher, ingress and HTTP have no part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ray import serve

from router.engine_link import EngineLinks
from workers.api.replica import ReplicaInfo
from workers.api.request import Delta, EngineRequest, SamplingParams

APPLICATION = "doors"


class Door:
    """Takes the first engine of `infos` that has no door yet; `folder` says which ones have."""

    def __init__(self, infos: Sequence[ReplicaInfo], secret: str, folder: str) -> None:
        for info in infos:
            with contextlib.suppress(FileExistsError):
                (Path(folder) / info.id).touch(exist_ok=False)
                self._info = info
                break
        self._links = EngineLinks(f"door-{self._info.id}", secret=secret)

    async def generate(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[str]:
        """The engine's id with the first token, and once more at the end."""
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        sampling = SamplingParams(max_tokens=tokens)
        request = EngineRequest(f"door-{uuid.uuid4().hex}", tuple(prompt), sampling)
        link = await self._links.get(self._info)
        stream = link.submit([request], lambda batch: all(_kept(deltas, delta) for delta in batch))
        try:
            delta = await deltas.get()
            yield self._info.id
            while delta.finish is None:
                delta = await deltas.get()
            yield self._info.id
        finally:
            stream.close()


def _kept(deltas: asyncio.Queue[Delta], delta: Delta) -> bool:
    deltas.put_nowait(delta)
    return delta.finish is None


@contextlib.contextmanager
def doors(infos: Sequence[ReplicaInfo], secret: str, folder: Path) -> Iterator[Any]:
    """A handle to them, in the block: `.remote(prompt, tokens)` streams what `Door.generate` yields."""
    deployment = serve.deployment(
        Door,
        num_replicas=len(infos),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=infos[0].max_num_seqs,
        graceful_shutdown_timeout_s=1,
    )
    handle = serve.run(deployment.bind(list(infos), secret, str(folder)), name=APPLICATION, route_prefix=None)
    try:
        yield handle.options(method_name="generate", stream=True)
    finally:
        serve.delete(APPLICATION)
