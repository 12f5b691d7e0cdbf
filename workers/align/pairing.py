"""Which tensor of ours belongs to which of transformers': by the checkpoint's names, put together over the ranks.

A module of ours may hold several of transformers' (q, k and v as one product) or a share of one. What the loader knows
of checkpoint tensors says which channels of its output, or input, are whose.

Shapes: R rows, one for each token of all prompts, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from workers.align.recording import INPUT, Event, Recording
from workers.layers.build import Loadable
from workers.models.base import CausalModel
from workers.quant.method import Part


@dataclass(frozen=True, slots=True)
class Rows:
    """What one rank recorded, each [R, ...]; `several`: see `Recording`."""

    tensors: dict[Event, torch.Tensor]
    several: frozenset[str]

    @staticmethod
    def of(recording: Recording, rows: Sequence[tuple[int, int]], steps: int) -> Rows:
        """Sorted by prompt and position; events that were not in every step are left out."""
        order = torch.tensor(sorted(range(len(rows)), key=lambda i: rows[i]))
        whole: dict[Event, torch.Tensor] = {}
        for event, parts in recording.tensors.items():
            if len(parts) == steps and len({part.shape[1:] for part in parts}) == 1:
                whole[event] = torch.cat(parts)[order.to(parts[0].device)]
        return Rows(whole, frozenset(recording.several))


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of one checkpoint tensor: parts of `parameter`, which is its `module`'s."""

    module: nn.Module
    parameter: nn.Parameter
    parts: list[Part]

    @staticmethod
    def of(model: CausalModel) -> dict[str, Held]:
        """By the checkpoint's name."""
        held: dict[str, Held] = {}
        for path, parameter in model.named_parameters():
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            parts = module.parts(name) if isinstance(module, Loadable) else {"": Part.whole(tuple(parameter.shape))}
            for part_id, part in parts.items():
                sources = (rule.source(path, part_id) for rule in model.weight_rules)
                source = next((s for s in sources if s is not None), path)
                held.setdefault(source, Held(module, parameter, [])).parts.append(part)
        return held


class Pairing:
    """Of one model of ours, on all of its ranks, with transformers'."""

    def __init__(self, ours: Sequence[CausalModel], reference: nn.Module) -> None:
        self.ours, self.reference = ours, reference
        self._targets = [Held.of(model) for model in ours]
        self._paths = [{id(module): path for path, module in model.named_modules()} for model in ours]
        self._swapped = {n for n, m in reference.named_modules() if type(m).__name__ == "Conv1D"}

    def path(self, name: str) -> str | None:
        """Our module for transformers' module `name`, if there is one."""
        target = self._target(name)
        if target is not None:
            found: str = self._paths[0][id(target.module)]
            return found
        return name if name in self._paths[0].values() else None

    def weight(self, name: str) -> torch.Tensor | None:
        """Parameter `name` of transformers' as the ranks hold it together, in its shape there."""
        if name not in self._targets[0]:
            return None
        full: torch.Tensor | None = None
        for one in self._targets:
            for part in one[name].parts:
                full = torch.zeros(part.shape, device=one[name].parameter.device) if full is None else full
                if not any(s.start == s.stop for s in part.source):
                    full[part.source] = one[name].parameter.detach()[part.target].float()
        return full

    def candidates(self, event: Event, wanted: torch.Tensor, ranks: Sequence[Rows]) -> list[torch.Tensor]:
        """What of ours must equal `wanted` [R, ...]: the same from every rank, or their shares put together.

        Nothing where the two are not made alike.
        """
        path = self.path(event.name)
        if path is None or path in ranks[0].several:
            return []
        found = [rows.tensors.get(Event(path, event.side)) for rows in ranks]
        have = [tensor for tensor in found if tensor is not None]
        if len(have) < len(ranks):
            return []
        if self._is_share(event, have[0]) and (whole := self._together(event, wanted, have)) is not None:
            return [whole]
        if have[0].shape == wanted.shape:
            return have
        for dim in {1, wanted.dim() - 1}:
            alike = all(t.dim() == wanted.dim() for t in have)
            if alike and (joined := torch.cat(have, dim=dim)).shape == wanted.shape:
                return [joined]
        return []

    def _target(self, name: str) -> Held | None:
        return next((self._targets[0][n] for n in (f"{name}.weight", f"{name}.bias") if n in self._targets[0]), None)

    def _is_share(self, event: Event, mine: torch.Tensor) -> bool:
        """Whether a rank's tensor has only some channels of transformers', or channels of others beside them."""
        one, axis = self._targets[0].get(f"{event.name}.weight"), self._axis(event)
        if one is None or one.parameter.dim() != 2 or mine.shape[-1] != one.parameter.shape[axis]:
            return False  # not a linear, or one whose result is gathered
        part, whole = one.parts[0], slice(0, mine.shape[-1])
        return len(one.parts) > 1 or not (part.source[axis] == part.target[axis] == whole)

    def _axis(self, event: Event) -> int:
        """Of a linear's weight: the one that stands for this side of it."""
        return int((event.side == INPUT) != (event.name in self._swapped))

    def _together(self, event: Event, wanted: torch.Tensor, have: list[torch.Tensor]) -> torch.Tensor | None:
        source = f"{event.name}.weight"
        if source not in self._targets[0] or wanted.dim() != 2:
            return None
        axis = self._axis(event)
        whole = torch.full_like(wanted, torch.nan)
        for one, mine in zip(self._targets, have, strict=True):
            for part in one[source].parts:
                shape, to, at = part.shape, part.source[axis], part.target[axis]
                if len(shape) != 2 or shape[axis] != wanted.shape[1] or at.stop > mine.shape[1]:
                    return None
                whole[:, to] = mine[:, at]
        return whole
