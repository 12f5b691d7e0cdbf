"""Patching: modules of a transformers model get the methods of their rewrite, and stay the objects that they were.

A rewrite is a class with any of these, all of them optional:

- `forward`, or any other method of the original class: used in its place; `super()` is the original.
- `_distribute_partition_fn(cls, mod_name, mod, device_mesh)`: called for every module inside, before weights are
  loaded; cuts it with `column_parallel` or `row_parallel`. With it the derived plan leaves the inside alone.
- `_distribute_output_fn(cls, outputs, device_mesh)`: called with what `forward` returns, where ranks are several;
  `device_mesh.all_reduce(tensor)` sums over them.
- `_update_model_fn(self)`: called once, after the weights are loaded.

Inside of a patched module `self.origin_mod` is the module as it was (the same weights), `self.context.context` is the
`StepContext` of the step under way, and `self.tensor_group` the ranks that share the model.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from workers.api.errors import ConfigError
from workers.models.patch_map import key_for, missed, rewrite_for
from workers.models.step_context import StepContext, step_context
from workers.parallel.group import Group

log = logging.getLogger("echelon.patch")


class Extra:
    """What a patched module is given beside its arguments. `context` is the step under way, unless it was set."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        if name == "context":
            return step_context()
        raise AttributeError(f"no extra argument {name!r} was given, only {sorted(self.given)}")


class Patched(nn.Module):
    """What every patched module has, before its rewrite and its own class."""

    context: Extra
    tensor_group: Group
    original_class: type[nn.Module]
    rewrite_class: type[nn.Module]
    extra_names: tuple[str, ...] = ()

    @property
    def origin_mod(self) -> Any:
        """The unpatched module over the same weights and children; made anew at each access, so it is never stale."""
        origin = object.__new__(self.original_class)
        # Hooks see the patched module: once is enough.
        hooks: dict[str, Any] = {
            name: OrderedDict() for name in self.__dict__ if name.startswith("_") and name.endswith("_hooks")
        }
        origin.__dict__ = {**self.__dict__, **hooks}
        return origin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The rewrite's, and its exchange with the other ranks."""
        out = super().forward(*args, **kwargs)
        exchange = getattr(self, "_distribute_output_fn", None)
        return out if exchange is None or self.tensor_group.size == 1 else exchange(out, self.tensor_group)

    def patched_forward(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, given also what `patch` was told as `extra_args`; `context` becomes the step under way."""
        before = self.context.given
        self.context.given = {name: kwargs.pop(name) for name in list(kwargs) if name in self.extra_names}
        try:
            with ExitStack() as stack:
                step = self.context.given.get("context")
                if isinstance(step, StepContext):
                    stack.enter_context(step.active())
                return self(*args, **kwargs)
        finally:
            self.context.given = before


@functools.cache
def _patched_class(own: Any, rewrite: Any) -> Any:
    names = {"__module__": own.__module__, "original_class": own, "rewrite_class": rewrite}
    return type(own.__name__, (Patched, rewrite, own), names)


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What was patched: the rewrite and the number of modules by key of the map; `distributed` cut themselves."""

    rewrites: Mapping[str, str]
    counts: Mapping[str, int]
    distributed: tuple[str, ...]

    def lines(self) -> list[str]:
        """One for each entry that was used."""
        return [f"{key} -> {self.rewrites[key]} ({n})" for key, n in self.counts.items()]


def patch_model(model: nn.Module, group: Group) -> PatchReport:
    """Patch all modules of `model` that the map knows, and log it. Its parameters have no storage yet.

    Raises ConfigError where an entry that should have matched did not: see `patch_map.missed`.
    """
    counts: Counter[str] = Counter()
    rewrites: dict[str, str] = {}
    distributed: list[str] = []
    files = {type(m).__module__ for m in model.modules()}
    extra = Extra()
    for path, module in list(model.named_modules()):
        key = key_for(type(module))
        if key is None:
            continue
        rewrite = rewrite_for(key)
        _swap(module, rewrite, group, extra)
        counts[key] += 1
        rewrites[key] = f"{rewrite.__module__}.{rewrite.__qualname__}"
        cutter = getattr(rewrite, "_distribute_partition_fn", None)
        if cutter is not None:
            distributed.append(path)
    for path in distributed:
        module = model.get_submodule(path)
        for name, inner in list(module.named_modules()):
            if inner is not module:
                module._distribute_partition_fn(name, inner, group)  # type: ignore[operator]
    if unmatched := missed(counts, files):
        raise ConfigError(f"entries of the patch map match no module of the model: {', '.join(unmatched)}")
    report = PatchReport(rewrites, dict(counts), tuple(distributed))
    for line in report.lines():
        log.info("patched %s", line)
    return report


def update_model(model: nn.Module) -> None:
    """Call `_update_model_fn` of every patched module that has one: the weights are loaded."""
    for module in model.modules():
        if isinstance(module, Patched) and hasattr(module.rewrite_class, "_update_model_fn"):
            module._update_model_fn()  # type: ignore[operator]


def patch(module: nn.Module, extra_args: Iterable[str] = ()) -> Any:
    """Patch one module of a transformers model, with all inside of it, to try a rewrite.

    It then has `patched_forward(..., NAME=...)` for every NAME in `extra_args`. Raises ConfigError where the map has
    nothing for it.
    """
    extra, group, found = Extra(), Group("tp"), 0
    for inner in list(module.modules()):
        if isinstance(inner, Patched):
            inner.context, inner.extra_names = extra, tuple(extra_args)
            found += 1
        elif (key := key_for(type(inner))) is not None:
            _swap(inner, rewrite_for(key), group, extra)
            inner.extra_names = tuple(extra_args)  # type: ignore[assignment]
            found += 1
    if not found:
        raise ConfigError(f"the patch map has nothing for {type(module).__module__}.{type(module).__qualname__}")
    for inner in module.modules():
        if isinstance(inner, Patched) and hasattr(inner.rewrite_class, "_update_model_fn"):
            inner._update_model_fn()  # type: ignore[operator]
    return module


def _swap(module: nn.Module, rewrite: Any, group: Group, extra: Extra) -> None:
    own: Any = type(module)
    module.__class__ = _patched_class(own, rewrite)
    module.context, module.tensor_group = extra, group  # type: ignore[assignment]
