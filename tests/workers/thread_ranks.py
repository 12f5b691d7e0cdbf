"""Ranks as threads of one process: cheap tensor parallelism for tests (with gloo: test_tensor_parallel.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from workers.parallel.group import Group, Groups

T = TypeVar("T")


class Meeting:
    """Where `size` threads exchange tensors; a thread that does not come breaks it for all."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[Any] = [None] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What each thread brought, copied, in the order of the ranks."""
        self.brought[rank] = x.clone()
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class ThreadGroup(Group):
    """A group whose ranks are threads that share a `Meeting`.

    It claims to fuse sums with norms, as peer memory does, so that models leave their sums to the norms behind them.
    """

    fuses = True

    def barrier(self) -> None:
        self.handle.barrier.wait()

    def _sum(self, x: torch.Tensor) -> None:
        first, *others = self.handle.exchange(self.rank, x)
        x.copy_(sum(others, start=first))

    def _gather(self, room: torch.Tensor, x: torch.Tensor) -> None:
        torch.cat(self.handle.exchange(self.rank, x), out=room)

    def _say(self, said: torch.Tensor) -> Callable[[], object]:
        self._sum(said)
        return lambda: None


def on_ranks(size: int, work: Callable[[int, Groups], T]) -> list[T]:
    """What `work(rank, groups)` returns on each of `size` ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(rank, Groups(tp=ThreadGroup("tp", rank, size, meeting)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [f.result() for f in futures]
