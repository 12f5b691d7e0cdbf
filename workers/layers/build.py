"""What every layer is told when it is made, and how a layer declares its checkpoint tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from workers.api.errors import ConfigError
from workers.parallel.group import Groups
from workers.quant.method import BatchInvariantLinear, LinearMethod, Part, UnquantizedLinear

_PLAIN, _INVARIANT = UnquantizedLinear(), BatchInvariantLinear()


@dataclass(frozen=True, slots=True)
class Build:
    """Where and how layers are made. `linear_method` maps a linear's dotted name to its method.

    `batch_invariant`: a token's result may not depend on the other tokens of its step, not in its last bit.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: Groups = field(default_factory=Groups)
    linear_method: Callable[[str], LinearMethod] = lambda _name: _PLAIN
    batch_invariant: bool = False

    @staticmethod
    def invariant(dtype: torch.dtype, device: torch.device, groups: Groups) -> Build:
        """A build whose layers are batch-invariant."""
        return Build(dtype, device, groups, lambda _name: _INVARIANT, batch_invariant=True)


@runtime_checkable
class Loadable(Protocol):
    """A module that says which checkpoint tensors fill its own parameters. Others are filled whole, one to one."""

    def parts(self, name: str) -> Mapping[str, Part]:
        """The tensors of parameter `name`, by part id ("" where there is one only)."""

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """Put the source slice of a part into the parameter."""

    def finish(self) -> None:
        """All parts are loaded."""


def divide(total: int, ranks: int, what: str) -> int:
    """total / ranks. Raises ConfigError where that leaves a rest."""
    if total % ranks:
        raise ConfigError(f"{what} is {total}, which {ranks} tensor-parallel ranks do not divide")
    return total // ranks
