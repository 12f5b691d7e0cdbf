"""Votes of ranks on one host, through shared memory: a microsecond where the process group would take a hundred.

A rank writes how many votes it has given, with its say in the lowest bit, and reads what the others wrote. There are
two places for that, taken in turn: nobody writes one again before all have read it, since by then all have voted once
more, and each asks for a vote's outcome before it votes again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from workers.parallel.channel import host_id
from workers.parallel.group import Group, Outcome

SPIN_SECONDS, NAP_SECONDS = 100e-6, 50e-6
_LINE = 8  # words of 8 bytes, so that each rank has a cache line of its own
_FOLDER = Path("/dev/shm")

log = logging.getLogger("echelon.parallel")


class Board:
    """One rank's end; `memory` holds `bytes_needed` zeros that all ranks of the host share."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int) -> None:
        self._words = memoryview(memory).cast("Q")  # each is read and written as a whole
        self._rank, self._size = rank, size
        self._count, self._seconds = 0, float("inf")

    @staticmethod
    def bytes_needed(size: int) -> int:
        """Of a board for so many ranks."""
        return 2 * size * _LINE * 8

    def set_timeout(self, seconds: float) -> None:
        """See `Groups.set_timeout`."""
        self._seconds = seconds

    def vote(self, *, says: bool) -> Outcome:
        """See `Group.vote`. The outcome raises TimeoutError, naming a rank that did not vote."""
        self._count += 1
        first = self._count % 2 * self._size * _LINE
        self._words[first + self._rank * _LINE] = self._count << 1 | says
        return lambda: [rank for rank in range(self._size) if self._read(first, rank)]

    def _read(self, first: int, rank: int) -> int:
        at = first + rank * _LINE
        began = 0.0
        while (word := self._words[at]) >> 1 != self._count:
            now = time.monotonic()
            began = began or now
            if now - began > self._seconds:
                raise TimeoutError(f"rank {rank} of the group has not voted for {self._seconds:g} s")
            if now - began > SPIN_SECONDS:
                time.sleep(NAP_SECONDS)
            else:
                os.sched_yield()
        return word & 1


def share_board(group: Group, device: torch.device, host: str = "") -> Group:
    """`group` with a board, where all of its ranks, which come here together, are on one `host`."""
    if group.size == 1 or not isinstance(group.handle, dist.ProcessGroup):
        return group
    place = int.from_bytes(hashlib.blake2b(f"{host_id()} {host}".encode(), digest_size=7).digest(), "little")
    said = group.agree([place, secrets.randbits(60)], device)
    if len({one[0] for one in said}) > 1:
        return group
    path = _FOLDER / f"echelon-votes-{said[0][1]:015x}"
    size = Board.bytes_needed(group.size)
    if group.rank == 0:
        with contextlib.suppress(OSError):
            path.touch(mode=0o600, exist_ok=False)
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    group.agree([0], device)  # it is there
    memory = None
    with contextlib.suppress(OSError, ValueError), path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), size)
    all_have_it = all(one[0] for one in group.agree([int(memory is not None)], device))
    if group.rank == 0:
        path.unlink(missing_ok=True)
    if memory is None or not all_have_it:
        log.warning(
            "rank %d: no memory in %s for the votes of %s, which go by messages", group.rank, _FOLDER, group.name
        )
        return group
    return replace(group, board=Board(memory, group.rank, group.size))
