"""Looking at a cluster from an event loop: calls that block have a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")


async def look(call: Callable[[], T]) -> T:
    """What `call` returns, from a thread."""
    return await asyncio.to_thread(call)


async def until(condition: Callable[[], Any], seconds: float, *, every: float = 0.05) -> float | None:
    """Seconds until `condition` held; None when it did not."""
    began = monotonic()
    while not await look(condition):
        if monotonic() - began > seconds:
            return None
        await asyncio.sleep(every)
    return monotonic() - began
