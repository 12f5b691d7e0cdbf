"""How a replica leaves: no new leases, time for those that run, and the rest goes on elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import ray

from workers.api.replica import ReplicaInfo

POLL_SECONDS = 0.1
FAREWELL_SECONDS = 2.0  # for the dispatcher to hear of it, and again for the ingresses
MARGIN_SECONDS = 10.0  # that Serve gives a replica beyond its limit, before it kills it

log = logging.getLogger("ray.serve")  # Serve routes this one to the replica's log file

Find = Callable[[], Awaitable[Any]]


class Busy(Protocol):
    """What has sequences: a gang."""

    async def sequences(self) -> int:
        """How many have not ended."""


async def leave(info: ReplicaInfo, gang: Busy, *, find: Find, limit: float, reason: str) -> int:
    """Drain the replica at `info` for at most `limit` seconds, then take it out of the dispatcher that `find` gives.

    Returns how many leases, or sequences, were left: their requests are replayed elsewhere, and the engine has none of
    them any more, unless an ingress does not answer.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while (left := await _left(info, gang, find)) and loop.time() < deadline:  # noqa: ASYNC110 - nobody tells us
        await asyncio.sleep(POLL_SECONDS)
    if left:
        log.warning("replica %s: %d requests are moved: they still run after %g s", info.id, left, limit)
    await _say(find, "unregister", info.id, reason)
    # An ingress that sees the connection break before it hears the reason takes this for a death.
    deadline = loop.time() + FAREWELL_SECONDS
    while await gang.sequences() and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS / 5)
    log.info("replica %s leaves: %s", info.id, reason)
    return left


async def _left(info: ReplicaInfo, gang: Busy, find: Find) -> int:
    """What has not ended; while the dispatcher is away, sequences alone count."""
    leases = await _say(find, "drain", info)
    return max(leases or 0, await gang.sequences())


async def _say(find: Find, method: str, *arguments: Any) -> Any:
    """What `method` of the dispatcher's actor answers; None when it cannot be reached."""
    try:
        async with asyncio.timeout(FAREWELL_SECONDS):
            dispatcher = await find()
            return await getattr(dispatcher, method).remote(*arguments)
    except (ConnectionError, TimeoutError, ray.exceptions.RayError) as e:
        log.warning("the dispatcher does not hear that a replica leaves (%s): %s", method, e)
        return None
