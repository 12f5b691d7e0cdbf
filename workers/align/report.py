"""What `align` found, as a person and as a program reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one tensor."""

    shape: tuple[int, ...]
    mean: float
    std: float
    least: float
    greatest: float

    @staticmethod
    def of(tensor: torch.Tensor) -> Statistics:
        """In fp32."""
        t = tensor.float()
        spread = float(t.std()) if t.numel() > 1 else 0.0
        return Statistics(tuple(t.shape), float(t.mean()), spread, float(t.min()), float(t.max()))

    def __str__(self) -> str:
        return (
            f"{list(self.shape)} mean {self.mean:.5g} std {self.std:.5g} from {self.least:.5g} to {self.greatest:.5g}"
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """The first module that differs. `side`: "output", or "inside" where its parts agree and it does not.

    The greatest difference is at `position` of prompt `prompt`.
    """

    module: str
    our_module: str | None
    side: str
    greatest: float
    prompt: int
    position: int
    ours: Statistics
    theirs: Statistics
    cause: str


@dataclass(frozen=True, slots=True)
class ScenarioReport:
    """`compared`: tensors; `error`: the greatest difference of the logits, beside their root mean square."""

    name: str
    ranks: int
    compared: int
    error: float
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class AlignReport:
    """Of one model. `way` says what runs it; `plan` and `patched` what was derived and rewritten, if anything was."""

    model: str
    architecture: str
    way: str
    plan: tuple[str, ...]
    patched: tuple[str, ...]
    scenarios: tuple[ScenarioReport, ...]

    @property
    def difference(self) -> Difference | None:
        """That of the first scenario that has one."""
        return next((one.difference for one in self.scenarios if one.difference is not None), None)

    def to_json(self) -> dict[str, Any]:
        """All of it, and `aligned`."""
        return {**asdict(self), "aligned": self.difference is None}

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"{self.model}: {self.architecture}, {self.way}"]
        lines += [f"  patched {line}" for line in self.patched]
        lines += [f"  cut {line}" for line in self.plan]
        for one in self.scenarios:
            name = one.name if one.ranks == 1 else f"{one.name}, {one.ranks} ranks"
            state = "equal" if one.difference is None else f"differs first in {one.difference.module}"
            lines.append(f"  {name}: {state} ({one.compared} tensors, logits within {one.error:.2g})")
        if (found := self.difference) is not None:
            lines += [
                f"first module that differs: {found.module} ({found.side}), ours is {found.our_module}",
                f"  greatest difference {found.greatest:.5g}, at token {found.position} of prompt {found.prompt}",
                f"  ours          {found.ours}",
                f"  transformers' {found.theirs}",
                f"  likely cause: {found.cause}",
            ]
        return lines
