"""Where the ranks of replicas are, for a front that is asked each second: looked up in a thread, and kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from time import monotonic

import ray
from ray.exceptions import RayError

from cluster.room import rank_homes

KEPT_SECONDS = 5.0

log = logging.getLogger("echelon.cluster")


class RankPlaces:
    """`router.http.overview.Places`, from Ray's placement groups. Ray answers nothing while its head is away; then what
    was known stands.
    """

    def __init__(self) -> None:
        self._known: Mapping[str, Sequence[str]] = {}
        self._looked_at = float("-inf")
        self._look: asyncio.Task[None] | None = None

    def ranks(self) -> Mapping[str, Sequence[str]]:
        """As last looked up; in an event loop, where it starts the next look when this one is old."""
        old = monotonic() - self._looked_at > KEPT_SECONDS
        if old and (self._look is None or self._look.done()):
            self._looked_at = monotonic()
            self._look = asyncio.create_task(self._look_up(), name="ranks' places")
        return self._known

    async def _look_up(self) -> None:
        try:
            self._known = await asyncio.to_thread(_rank_addresses)
        except RayError as e:
            log.info("where ranks are is not known: %s", e)


def _rank_addresses() -> dict[str, list[str]]:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    homes = rank_homes()
    return {replica: [addresses.get(node, "a node that is gone") for node in nodes] for replica, nodes in homes.items()}
