"""The foreign nodes of a dispatcher: added, removed, and looked at again and again.

One miss says little and one hit as well: a node gets no leases after MISSES misses in a row, and gets them again after
HITS hits. It stays in the table until somebody removes it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Protocol

from router.foreign.node import NodeSpec, list_models, node_info
from router.foreign.upstream import Deadlines
from workers.api.errors import NodeFailed
from workers.api.replica import ReplicaInfo

LOOK_SECONDS = 2.0
PROBE_SECONDS = 3.0
MISSES, HITS = 3, 2

log = logging.getLogger("echelon.dispatcher")


class NodeTable(Protocol):
    """Whom the nodes are told to. Called in the event loop."""

    def node_up(self, info: ReplicaInfo, speed: float | None) -> None:
        """A model of a node may be dispatched to."""

    def node_health(self, replica_id: str, *, well: bool) -> None:
        """Whether the node answers."""

    def node_down(self, replica_id: str, reason: str) -> None:
        """A model of a node is gone."""


@dataclass(slots=True)
class _Watched:
    spec: NodeSpec
    task: asyncio.Task[None]


class ForeignNodes:
    """Every node is probed each `every` seconds; a probe that takes `patience` seconds is a miss."""

    def __init__(self, table: NodeTable, *, every: float = LOOK_SECONDS, patience: float = PROBE_SECONDS) -> None:
        self._table, self._every, self._patience = table, every, patience
        self._deadlines = Deadlines(patience, patience, patience)
        self._nodes: dict[str, _Watched] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all nodes, in the order they were added."""
        return tuple(self._nodes)

    async def add(self, spec: NodeSpec) -> None:
        """`spec` is in the table; one that was there by the same URL is replaced.

        Raises NodeFailed, with nothing changed, when it was not told its models and does not list them.
        """
        well, models = True, spec.models
        try:
            listed = await self._probe(spec)
            models = models or listed
        except NodeFailed:
            if not models:
                raise
            well = False
        self.remove(spec.url, "replaced")
        spec = replace(spec, models=models)
        for model in models:
            self._table.node_up(node_info(spec, model), spec.speed)
        self._tell(spec, well=well)
        self._nodes[spec.url] = _Watched(spec, asyncio.create_task(self._watch(spec, well), name=f"node {spec.url}"))
        log.info("node %s is added with %s", spec.url, ", ".join(models))

    def remove(self, url: str, reason: str = "removed") -> bool:
        """`url` is in the table no more; False if it was not."""
        watched = self._nodes.pop(url, None)
        if watched is None:
            return False
        watched.task.cancel()
        for model in watched.spec.models:
            self._table.node_down(node_info(watched.spec, model).id, reason)
        return True

    async def close(self) -> None:
        """Nobody is looked at any more."""
        tasks = [watched.task for watched in self._nodes.values()]
        self._nodes.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _probe(self, spec: NodeSpec) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(self._patience):
                return await list_models(spec.url, spec.key, self._deadlines)
        except TimeoutError as e:
            raise NodeFailed(f"has not listed its models within {self._patience:g} s") from e

    async def _watch(self, spec: NodeSpec, well: bool) -> None:
        misses = hits = 0
        while True:
            await asyncio.sleep(self._every)
            try:
                await self._probe(spec)
                misses, hits = 0, hits + 1
            except NodeFailed as e:
                misses, hits = misses + 1, 0
                log.info("node %s %s", spec.url, e)
            if well and misses >= MISSES:
                well = False
                log.warning("node %s gets no leases until it is well again", spec.url)
            elif not well and hits >= HITS:
                well = True
                log.warning("node %s is well again", spec.url)
            if not misses or not well:  # in between nothing is known
                self._tell(spec, well=well)

    def _tell(self, spec: NodeSpec, *, well: bool) -> None:
        for model in spec.models:
            self._table.node_health(node_info(spec, model).id, well=well)
