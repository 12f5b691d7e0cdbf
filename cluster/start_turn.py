"""Turns at starting: on a machine with few cores, gangs load one after another.

Two gangs that load at once on two cores both take twice as long; in turn, the first one answers in half the time and
the second is no later. A turn is a courtesy: whoever has waited `MOST_WAIT` seconds starts anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.environment import cpu_count

CORES_PER_RANK = 2  # that loading a rank keeps busy, its supervisor's and Ray's part included
MOST_WAIT = 60.0
POLL_SECONDS = 0.05

log = logging.getLogger("ray.serve")


def turns_at_once(ranks: int, cores: int | None = None) -> int:
    """How many gangs of `ranks` may load at once on this machine."""
    return max(1, (cores or cpu_count()) // (CORES_PER_RANK * ranks))


@contextlib.asynccontextmanager
async def start_turn(at_once: int, *, folder: Path | None = None, most_wait: float = MOST_WAIT) -> AsyncIterator[None]:
    """Hold one of `at_once` turns of this user on this machine; the end of the process gives it back, too."""
    folder = folder or Path(tempfile.gettempdir())
    deadline = time.monotonic() + most_wait
    turn = None
    while turn is None and time.monotonic() < deadline:
        turn = _try_turn(at_once, folder)
        if turn is None:
            await asyncio.sleep(POLL_SECONDS)
    if turn is None:
        log.warning("no turn at starting within %.0f s: starting beside the others", most_wait)
    try:
        yield
    finally:
        if turn is not None:
            os.close(turn)


def _try_turn(at_once: int, folder: Path) -> int | None:
    """A file descriptor that holds a turn, or None while all are taken."""
    for number in range(at_once):
        path = folder / f"echelon-start-{os.getuid()}-{number}.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
        else:
            return fd
    return None
