"""A rank that cannot go on with a pass still comes to the rest of its collectives, so that nobody waits for it.

Which collectives a pass has is learned once, from a few short ones: a pass is made of pieces (`BODY` and those after
it), and each of a piece's collectives has a shape that grows with the piece's rows by fixed steps. What a rank brings
in place of what it could not compute is whatever lies in its reserve, memory that is set aside at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from workers.api.errors import EngineFault

BODY = "body"  # the model over a step's tokens
HEAD = "head"  # this rank's part of the logits of some rows
GATHER = "gather"  # the parts put together
GREEDY = "greedy"  # a draw of the most likely tokens from the parts
LEARNED_FROM = (2, 3, 5)  # rows
_ALIGN = 256  # bytes

Piece = tuple[str, int]  # its name, and how many rows
T = TypeVar("T")


class Gathering(Protocol):
    """What of a group a rank comes to."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `x`, in place."""

    def gather_into(self, room: torch.Tensor, x: torch.Tensor) -> None:
        """The ranks' `x` behind each other."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One that a rank came to: it gathers, or sums."""

    gathers: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of what one rank brings."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Growing:
    """A collective of a piece: of n rows it has the shape `fixed` + n * `a_row`."""

    gathers: bool
    fixed: tuple[int, ...]
    a_row: tuple[int, ...]
    dtype: torch.dtype

    def of(self, rows: int) -> Collective:
        shape = tuple(fixed + rows * each for fixed, each in zip(self.fixed, self.a_row, strict=True))
        return Collective(self.gathers, shape, self.dtype)


class Attendance:
    """The collectives of one rank's passes: which there are, and how many of the pass under way it has come to."""

    def __init__(self) -> None:
        self._came = 0
        self._seen: list[Collective] | None = None  # while a piece is learned
        self._samples: dict[str, dict[int, list[Collective]]] = {}
        self._pieces: dict[str, tuple[_Growing, ...]] = {}
        self._reserve = torch.empty(0, dtype=torch.uint8)

    def note(self, x: torch.Tensor, *, gathers: bool) -> None:
        """A collective of `x` has been launched."""
        self._came += 1
        if self._seen is not None:
            self._seen.append(Collective(gathers, tuple(x.shape), x.dtype))

    def learn(self, name: str, rows: int, run: Callable[[], T]) -> T:
        """`run` is the piece `name` of so many rows, one of `LEARNED_FROM`."""
        seen: list[Collective] = []
        self._seen = seen
        try:
            return run()
        finally:
            self._seen = None
            self._samples.setdefault(name, {})[rows] = seen

    def conclude(self) -> str | None:
        """All pieces were learned; what it is that does not fit, if they are not made as they must be."""
        for name, samples in self._samples.items():
            first, second, third = (samples[rows] for rows in LEARNED_FROM)
            found = [_growing(*pair) for pair in zip(first, second, strict=False)]
            if not len(first) == len(second) == len(third) or None in found:
                return f"the collectives of its {name} are of several kinds"
            pieces = tuple(one for one in found if one is not None)
            if [one.of(LEARNED_FROM[2]) for one in pieces] != third:
                return f"the collectives of its {name} do not grow by the row"
            self._pieces[name] = pieces
        return None

    def reserve(self, most: Sequence[Piece], group: Gathering, device: torch.device) -> int:
        """Set aside what pieces of `most` rows need; returns the bytes."""
        needed = [
            _aligned(one.bytes) + (one.bytes * group.size if one.gathers else 0)
            for name, rows in most
            for one in (piece.of(rows) for piece in self._pieces[name])
        ]
        self._reserve = torch.empty(max(needed, default=0), dtype=torch.uint8, device=device)
        return self._reserve.numel()

    def begin(self) -> None:
        """A pass begins, or its draws do."""
        self._came = 0

    def complete(self, pieces: Sequence[Piece], group: Gathering) -> None:
        """Come to those collectives of `pieces`, since `begin`, to which this rank has not come. Needs no memory."""
        whole = [piece.of(rows) for name, rows in pieces for piece in self._pieces[name]]
        if self._came > len(whole):
            raise EngineFault(f"{self._came} collectives were made of {len(whole)} that a step was thought to have")
        for one in whole[self._came :]:
            own = self._part(one, 0, one.shape)
            if one.gathers:
                room = self._part(one, _aligned(one.bytes), (group.size * one.shape[0], *one.shape[1:]))
                group.gather_into(room, own)
            else:
                group.all_reduce(own)

    def _part(self, one: Collective, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        end = start + math.prod(shape) * one.dtype.itemsize
        return self._reserve[start:end].view(one.dtype).view(shape)


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _growing(first: Collective, second: Collective) -> _Growing | None:
    """What both are, of the first two of `LEARNED_FROM` rows."""
    same = first.gathers == second.gathers and first.dtype == second.dtype and len(first.shape) == len(second.shape)
    if not same:
        return None
    low, high = LEARNED_FROM[:2]
    steps = [(b - a) / (high - low) for a, b in zip(first.shape, second.shape, strict=True)]
    a_row = tuple(int(step) for step in steps)
    fixed = tuple(size - low * each for size, each in zip(first.shape, a_row, strict=True))
    return _Growing(first.gathers, fixed, a_row, first.dtype)
