"""Modules of transformers cut over the tensor-parallel ranks, in place: the module stays the object that it was.

`cut` gives a module another class, derived from its own, that knows which share of its parameters this rank holds
(see `Loadable`) and what has to happen around its forward. Nothing is loaded yet when that is done.

Shapes: a linear's weight is [outputs, inputs]; transformers' `Conv1D` has it the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workers.api.errors import ConfigError
from workers.layers.build import divide
from workers.parallel.group import Group
from workers.quant.method import Part


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank keeps of a tensor: `pieces` (start, size) of axis `dim`, beside each other; none: zeros instead."""

    full: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def local(self) -> tuple[int, ...]:
        """The shape on this rank."""
        size = sum(n for _, n in self.pieces) if self.pieces else self.full[self.dim]
        return (*self.full[: self.dim], size, *self.full[self.dim + 1 :])

    def part(self) -> Part:
        """For the loader. Of a tensor in several pieces the whole is read, and cut in `take`."""
        whole = [slice(0, n) for n in self.full]
        if len(self.pieces) > 1:
            return Part(self.full, tuple(whole), tuple(whole))
        start, size = self.pieces[0] if self.pieces else (0, 0)
        whole[self.dim] = slice(start, start + size)
        return Part(self.full, tuple(whole), tuple(slice(0, n) for n in self.local))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of what the loader read."""
        if len(self.pieces) < 2:
            return tensor
        return torch.cat([tensor.narrow(self.dim, start, size) for start, size in self.pieces], self.dim)


@dataclass(frozen=True, slots=True)
class Around:
    """What happens around a module's forward. `split`: its input is cut to this rank's share first."""

    split: bool = False
    gather: bool = False
    reduce: bool = False
    share: bool = False


class ShardedModule(nn.Module):
    """What a cut module has before its own class: see `Loadable`."""

    cuts: dict[str, Cut]
    around: Around
    group: Group

    def parts(self, name: str) -> Mapping[str, Part]:
        """See `Loadable`."""
        whole = Part.whole(tuple(getattr(self, name).shape))
        return {"": self.cuts[name].part() if name in self.cuts else whole}

    def load(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """See `Loadable`."""
        getattr(self, name).copy_(self.cuts[name].take(tensor) if name in self.cuts else tensor)

    def finish(self) -> None:
        """See `Loadable`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward over this rank's share, and the exchange with the others."""
        around, group = self.around, self.group
        if around.split:
            width = args[0].shape[-1] // group.size
            args = (args[0].narrow(-1, group.rank * width, width), *args[1:])
        if around.share:
            args = (args[0] / group.size, *args[1:])
        out = super().forward(*args, **kwargs)
        if around.gather:
            return group.all_gather(out)
        return group.all_reduce(out) if around.reduce else out


@functools.cache
def _sharded_class(own: Any) -> Any:
    return type(own.__name__, (ShardedModule, own), {"__module__": own.__module__})


def cut(module: nn.Module, group: Group, cuts: Mapping[str, Cut], around: Around | None = None) -> None:
    """Cut `module`, whose parameters have no storage yet; a second call adds to the first."""
    if not isinstance(module, ShardedModule):
        own: Any = type(module)
        module.__class__ = _sharded_class(own)
        module.cuts, module.around, module.group = {}, Around(), group  # type: ignore[assignment]
    assert isinstance(module, ShardedModule)
    module.cuts.update(cuts)
    if around is not None:
        module.around = around
    for name, one in cuts.items():
        old = module.get_parameter(name)
        new = torch.empty(one.local, dtype=old.dtype, device="meta")
        setattr(module, name, nn.Parameter(new, requires_grad=False))


def note_kv_heads(model: nn.Module, heads: int) -> None:
    """Tell the projections of keys and values how many heads they make: where ranks are more, ranks share a head."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("k_proj", "v_proj") and hasattr(module, "weight"):
            module.kv_heads = heads


def column_parallel(module: nn.Module, group: Group, *, gather: bool = False) -> None:
    """Cut a linear's outputs; by heads where `note_kv_heads` was told. `gather`: its result is whole again.

    Raises ConfigError where the ranks do not divide them.
    """
    if group.size == 1:
        return
    out_dim = _out_dim(module)
    full = module.get_parameter("weight").shape[out_dim]
    heads = int(getattr(module, "kv_heads", group.size))
    if heads < group.size and not gather:
        size = full // heads
        start = group.rank // divide(group.size, heads, f"tensor_parallel, by {heads} KV heads,") * size
    else:
        size = divide(full, group.size, f"output size of {type(module).__name__}")
        start = group.rank * size
    cuts = {"weight": _cut(module, "weight", out_dim, ((start, size),))}
    if module._parameters.get("bias") is not None:
        cuts["bias"] = _cut(module, "bias", 0, ((start, size),))
    cut(module, group, cuts, Around(gather=gather))
    _set_sizes(module, outputs=size)


def row_parallel(module: nn.Module, group: Group, *, split: bool = False, reduce: bool = False) -> None:
    """Cut a linear's inputs; its bias goes to rank 0 alone, since the ranks' results are to be summed.

    `split`: the input comes whole. `reduce`: sum here; otherwise that is the caller's.
    """
    if group.size == 1:
        return
    in_dim = 1 - _out_dim(module)
    size = divide(module.get_parameter("weight").shape[in_dim], group.size, f"input size of {type(module).__name__}")
    cuts = {"weight": _cut(module, "weight", in_dim, ((group.rank * size, size),))}
    if module._parameters.get("bias") is not None and group.rank > 0:
        cuts["bias"] = _cut(module, "bias", 0, ())
    cut(module, group, cuts, Around(split=split, reduce=reduce))
    _set_sizes(module, inputs=size)


def cut_parameter(module: nn.Module, name: str, dim: int, group: Group, *, packed: int = 1) -> None:
    """Cut one parameter along `dim`, each of its `packed` parts for itself."""
    if group.size == 1:
        return
    full = module.get_parameter(name).shape[dim]
    one = divide(full, packed, f"{name} of {type(module).__name__}, in parts,")
    size = divide(one, group.size, f"{name} of {type(module).__name__}")
    pieces = tuple((part * one + group.rank * size, size) for part in range(packed))
    cut(module, group, {name: _cut(module, name, dim, pieces)})


def _cut(module: nn.Module, name: str, dim: int, pieces: tuple[tuple[int, int], ...]) -> Cut:
    shape = tuple(module.get_parameter(name).shape)
    return Cut(shape, dim % len(shape), pieces)


def _out_dim(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return 0
    if type(module).__name__ == "Conv1D":
        return 1
    raise ConfigError(f"{type(module).__name__} is not a linear layer: it cannot be cut by column or row")


def _set_sizes(module: nn.Module, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """The sizes that a linear keeps beside its weight."""
    for name, value in (("in_features", inputs), ("nx", inputs), ("out_features", outputs), ("nf", outputs)):
        if value is not None and hasattr(module, name):
            setattr(module, name, value)
