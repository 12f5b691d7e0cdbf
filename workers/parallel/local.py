"""Several ranks as threads of one process: the same layers, with an exchange through memory. For tests and `align`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from workers.parallel.group import Group, Groups

T = TypeVar("T")
PATIENCE_SECONDS = 300.0  # a rank that does not come for so long ends the others


class _Table:
    """Where the ranks lay down what they exchange. Two meetings an exchange: all have given, all have taken."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self.given: list[torch.Tensor | None] = [None] * size

    def exchange(self, rank: int, x: torch.Tensor, use: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self.given[rank] = x
        self.barrier.wait()
        made = use([given for given in self.given if given is not None])
        self.barrier.wait()
        return made


@dataclass(frozen=True, slots=True)
class LocalGroup(Group):
    """A group of threads; `handle` is their table."""

    def barrier(self) -> None:
        """See `Group`."""
        self._table.barrier.wait()

    def _sum(self, x: torch.Tensor) -> None:
        x.copy_(self._table.exchange(self.rank, x, lambda all_: torch.stack(all_).sum(0)))

    def _gather(self, room: torch.Tensor, x: torch.Tensor) -> None:
        room.copy_(self._table.exchange(self.rank, x, torch.cat))

    def _say(self, said: torch.Tensor) -> Callable[[], object]:
        self._sum(said)
        return lambda: None

    @property
    def _table(self) -> _Table:
        return cast(_Table, self.handle)


def run_ranks(size: int, work: Callable[[int, Groups], T]) -> list[T]:
    """`work(rank, groups)` of all ranks at once, each in its thread; raises what one of them raises."""
    if size == 1:
        return [work(0, Groups())]
    table = _Table(size)

    def run(rank: int) -> T:
        group = LocalGroup("tp", rank, size, table)  # type: ignore[arg-type]
        try:
            return work(rank, Groups(tp=group))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="echelon-local-rank") as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:  # of one who was not merely left waiting, if there is one
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
