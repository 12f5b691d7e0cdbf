"""The activations of feed-forward layers, by the names that checkpoints give them.

Shapes: T tokens, I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kernels.activation import gelu_and_mul, silu_and_mul
from workers.api.errors import ConfigError

_SAME = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_and_mul,
    "gelu": lambda x: gelu_and_mul(x, approximate=False),
    "gelu_tanh": lambda x: gelu_and_mul(x, approximate=True),
}
_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _find(
    table: dict[str, Callable[[torch.Tensor], torch.Tensor]], name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    found = table.get(_SAME.get(name, name))
    if found is None:
        known = sorted({*table, *(a for a, b in _SAME.items() if b in table)})
        raise ConfigError(f"activation {name!r} is not supported here, only {', '.join(known)}")
    return found


class GateAndMul(nn.Module):
    """activation(gate) * up of a merged gate-up projection. Raises ConfigError on a name that is not known."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self._function = _find(_GATES, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 2 * I], the gate first -> [T, I]."""
        return self._function(x)


class Activation(nn.Module):
    """An activation without a gate. Raises ConfigError on a name that is not known."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self._function = _find(_PLAIN, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, I] -> [T, I]."""
        return self._function(x)
