"""Named process groups: tp (tensor), pp (pipeline), ep (experts). A group of one is free: no torch.distributed.

Groups are arguments: a model is built with a `Groups`, its layers keep the `Group` they need. Nothing here is global
but torch.distributed's own process group, which `connect` starts and `disconnect` ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist

from kernels.norms import add_rms_norm
from workers.api.errors import ConfigError
from workers.parallel.attendance import Attendance

DEFAULT_TIMEOUT_SECONDS = 60.0

Outcome = Callable[[], list[int]]  # of a vote: the ranks that say so

# Newer releases of torch call it so, and the other name deprecated.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange(Protocol):
    """A way to sum that is faster than the process group's, for some tensors; every rank gets the same bits."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it is for `x`: the same answer on every rank."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum `x` over the ranks, in place."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Group.add_rms_norm`."""

    def set_timeout(self, seconds: float) -> None:
        """See `Groups.set_timeout`; before, a rank that does not come is waited for without end."""


class Ballots(Protocol):
    """A way to vote."""

    def vote(self, *, says: bool) -> Outcome:
        """See `Group.vote`."""

    def set_timeout(self, seconds: float) -> None:
        """See `Groups.set_timeout`."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share one axis of parallelism. `rank` counts within the group.

    `votes`: a process group over the hosts' memory, where `handle` is over the devices'; `board`: a faster way to vote.
    `attendance` is told of each collective but votes.
    """

    name: str
    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    exchange: Exchange | None = None
    votes: dist.ProcessGroup | None = None
    board: Ballots | None = None
    attendance: Attendance | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} is outside of group {self.name} of size {self.size}")
        if self.size > 1 and self.handle is None:
            raise ConfigError(f"group {self.name} of size {self.size} needs a process group")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the ranks, in place; every rank gets the same bits."""
        if self.size == 1:
            return x
        if self.exchange is not None and self.exchange.takes(x):
            self.exchange.all_reduce(x)
        else:
            self._sum(x)
        if self.attendance is not None:
            self.attendance.note(x, gathers=False)
        return x

    @property
    def fuses(self) -> bool:
        """Whether a sum costs less together with the norm behind it."""
        return self.exchange is not None

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kernels.norms.add_rms_norm` of the sum of `x` [T, C] over the ranks; what `x` holds then is undefined."""
        if self.exchange is not None and self.exchange.takes(x):
            both = self.exchange.add_rms_norm(x, residual, weight, eps)
            if self.attendance is not None:
                self.attendance.note(x, gathers=False)
            return both
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' `x` [..., C] beside each other: [..., size * C], in the order of the ranks."""
        if self.size == 1:
            return x
        room = torch.empty((self.size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.gather_into(room, x.contiguous())
        return torch.cat(room.chunk(self.size), dim=-1)

    def gather_into(self, room: torch.Tensor, x: torch.Tensor) -> None:
        """The ranks' `x` [n, ...] behind each other: room [size * n, ...]; both contiguous."""
        self._gather(room, x)
        if self.attendance is not None:
            self.attendance.note(x, gathers=True)

    def vote(self, *, says: bool) -> Outcome:
        """This rank has said so or not. The hosts meet when one asks for the outcome, whatever is queued on devices;
        each is asked for before the next vote.
        """
        if self.board is not None:
            return self.board.vote(says=says)
        said = torch.zeros(self.size, dtype=torch.int32)
        said[self.rank] = says
        wait = self._say(said) if self.size > 1 else None

        def outcome() -> list[int]:
            if wait is not None:
                wait()
            return [rank for rank, one in enumerate(said.tolist()) if one]

        return outcome

    def agree(self, values: list[int], device: torch.device) -> list[list[int]]:
        """What every rank says, each as many numbers; `device` is one that the group's collectives know."""
        if self.size == 1:
            return [values]
        said = self.all_gather(torch.tensor(values, dtype=torch.int64, device=device))
        return [row.tolist() for row in said.view(self.size, -1)]

    def barrier(self) -> None:
        """Wait until every rank of the group is here."""
        if self.size > 1:
            dist.barrier(group=self.handle)

    def _sum(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, group=self.handle)

    def _gather(self, room: torch.Tensor, x: torch.Tensor) -> None:
        _gather(room, x, group=self.handle)

    def _say(self, said: torch.Tensor) -> Callable[[], object]:
        work = dist.all_reduce(said, group=self.votes or self.handle, async_op=True)
        return cast("Callable[[], object]", work.wait)


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of one rank. Without arguments: a replica of one rank."""

    tp: Group = field(default_factory=lambda: Group("tp"))
    pp: Group = field(default_factory=lambda: Group("pp"))
    ep: Group = field(default_factory=lambda: Group("ep"))

    def set_timeout(self, seconds: float) -> None:
        """From now on a collective that takes longer raises (gloo, an exchange), or ends the process (NCCL)."""
        for group in (self.tp, self.pp, self.ep):
            for way in (group.exchange, group.board):
                if way is not None:
                    way.set_timeout(seconds)
            for handle in (group.handle, group.votes):
                if handle is not None:
                    # Not public, but the way from the patience of a start to that of a step without groups made twice.
                    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), handle)


def connect(
    *,
    rank: int,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    init_method: str = "",
    backend: str = "gloo",
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Groups:
    """Join the replica's process group and cut it into named ones.

    The world has tensor_parallel * pipeline_parallel ranks; neighbours share a tensor-parallel group, experts use the
    same. `init_method` is a torch.distributed address ("tcp://host:port", "file://..."); `backend` is
    gloo or nccl. A collective that takes longer than the timeout raises. A world of one joins nothing.
    """
    world = tensor_parallel * pipeline_parallel
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is outside of a world of {world}")
    if world == 1:
        return Groups()
    if not init_method:
        raise ConfigError(f"a world of {world} ranks needs an init_method")
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world, timeout=timeout)

    def named(name: str, members: list[list[int]]) -> Group:
        # Every rank must make every group, its own or not, in the same order.
        mine = Group(name)
        for ranks in members:
            if len(ranks) == 1:
                continue
            handle = dist.new_group(ranks, timeout=timeout, backend=backend)
            votes = None if backend == "gloo" else dist.new_group(ranks, timeout=timeout, backend="gloo")
            if rank in ranks:
                mine = Group(name, ranks.index(rank), len(ranks), handle, votes=votes)
        return mine

    rows = [list(range(p * tensor_parallel, (p + 1) * tensor_parallel)) for p in range(pipeline_parallel)]
    columns = [list(range(t, world, tensor_parallel)) for t in range(tensor_parallel)]
    return Groups(tp=named("tp", rows), pp=named("pp", columns), ep=named("ep", rows))


def disconnect() -> None:
    """Leave the replica's process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
