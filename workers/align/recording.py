"""What the modules of a model took in and gave back, in one run or several.

Shapes: T tokens of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True, slots=True)
class Event:
    """One tensor that passed: the input or the output of module `name`."""

    name: str
    side: str


@dataclass(slots=True)
class Recording:
    """By event, the tensors [T, ...] of the steps, in the order in which the events first happened.

    `several`: modules that gave back more than one tensor, of which the first is here.
    """

    tensors: dict[Event, list[torch.Tensor]] = field(default_factory=dict)
    several: set[str] = field(default_factory=set)

    def note(self, event: Event, found: Any, tokens: int, step: int) -> None:
        """Keep the first tensor of floats in `found` that has a row for each token; of two in one step the first."""
        tensor = _tensor(found)
        if tensor is None:
            return
        if tensor.dim() > 1 and tensor.shape[0] == 1 and tensor.shape[1] == tokens:
            tensor = tensor[0]
        held = self.tensors.get(event)
        if tensor.shape[0] == tokens and (0 if held is None else len(held)) == step:
            self.tensors.setdefault(event, []).append(tensor.detach().float().clone())


def _tensor(found: Any) -> torch.Tensor | None:
    if isinstance(found, torch.Tensor):
        return found if found.is_floating_point() and found.dim() > 0 else None
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple) and found:
        return _tensor(found[0])
    return None


class Recorder:
    """Records the modules of `model` inside `recording`, a step after the other."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.recording, self._step, self._tokens = Recording(), 0, 0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """One forward pass of so many tokens."""
        self._tokens = tokens
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if name:
                    stack.enter_context(self._watch(name, module))
            yield
        self._step += 1

    @contextmanager
    def _watch(self, name: str, module: nn.Module) -> Iterator[None]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = args if args else [kwargs[k] for k in ("hidden_states", "x") if k in kwargs]
            self._note(name, INPUT, given)

        def after(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, tuple) and len(out) > 1 and isinstance(out[1], torch.Tensor):
                self.recording.several.add(name)
            self._note(name, OUTPUT, out)

        hooks = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        # Norms also have `add`, which no hook sees: norm of a sum, and the sum.
        add = getattr(module, "add", None)
        if callable(add) and isinstance(getattr(module, "weight", None), torch.Tensor):
            object.__setattr__(module, "add", functools.partial(self._add, name, add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            module.__dict__.pop("add", None)

    def _add(self, name: str, add: Callable[..., Any], x: torch.Tensor, residual: torch.Tensor) -> Any:
        self._note(name, INPUT, x + residual)
        out = add(x, residual)
        self._note(name, OUTPUT, out[0])
        return out

    def note(self, name: str, output: Any) -> None:
        """As if a module `name` had given back `output`; inside `step`."""
        self._note(name, OUTPUT, output)

    def _note(self, name: str, side: str, found: Any) -> None:
        self.recording.note(Event(name, side), found, self._tokens, self._step)
