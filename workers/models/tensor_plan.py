"""The tensor-parallel plan of a transformers model: which module is cut how.

It is the model's own plan (`base_model_tp_plan` of its config, `_tp_plan` of its class) where there is one. Where there
is none it comes from the shapes of the linears: a feed-forward block of two or three linears is cut by column, then by
row; any other linear keeps a share of its weights and its result is gathered, which is right whatever its forward does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from workers.api.errors import ConfigError
from workers.models.sharding import Around, column_parallel, cut, cut_parameter, row_parallel
from workers.parallel.group import Group

FROM_CONFIG, FROM_SHAPES = "base_model_tp_plan", "linear shapes"
# Styles of transformers that leave the forward pass as it is.
_WHOLE = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params"}
_WHOLE |= {"embedding_rowwise", "embedding_colwise"}  # embeddings stay whole on every rank


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """`styles` by dotted name of a module or parameter; `source` is FROM_CONFIG or FROM_SHAPES."""

    source: str
    styles: Mapping[str, str]

    def without(self, owners: Iterable[str]) -> TensorPlan:
        """The plan but for what lies inside of `owners`, who cut themselves."""
        prefixes = tuple(f"{owner}." for owner in owners)
        return TensorPlan(self.source, {k: v for k, v in self.styles.items() if not k.startswith(prefixes)})

    def summary(self) -> list[str]:
        """One line for what is cut alike, layers merged: "model.layers.*.mlp.up_proj: colwise (2)"."""
        merged = Counter((re.sub(r"\.\d+(?=\.|$)", ".*", name), style) for name, style in self.styles.items())
        return [f"{name}: {style} ({count})" if count > 1 else f"{name}: {style}"
                for (name, style), count in merged.items()]  # fmt: skip


def derive(model: Any) -> TensorPlan:
    """The plan of a transformers causal model, for any number of ranks."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    prefix = model.base_model_prefix
    base = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    patterns = {f"{prefix}.{key}": style for key, style in base.items()}
    source = FROM_CONFIG if base else FROM_SHAPES
    patterns |= getattr(type(model), "_tp_plan", None) or {}
    styles: dict[str, str] = {}
    for pattern, style in patterns.items():
        match = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")).fullmatch
        styles |= {name: style for name in names if match(name)}
    if not base:
        styles |= _from_shapes(model)
    return TensorPlan(source, styles)


def _from_shapes(model: nn.Module) -> dict[str, str]:
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    styles = {name: "colwise_gather_output" for name, child in model.named_children() if isinstance(child, nn.Linear)}
    if not stacks:
        return styles
    path, stack = max(stacks, key=lambda item: len(item[1]))
    for name, module in stack.named_modules(prefix=path):
        linears = {k: c for k, c in module.named_children() if isinstance(c, nn.Linear) or type(c).__name__ == "Conv1D"}
        if not linears:
            continue
        sizes = {k: _sizes(c) for k, c in linears.items()}
        last = list(sizes)[-1]
        inner, outer = sizes[last]
        others = [size for k, size in sizes.items() if k != last]
        feeds = inner != outer and others and all(size == (outer, inner) for size in others)
        alone = all(child in linears.values() or not list(child.parameters()) for child in module.children())
        if feeds and alone and len(linears) in (2, 3):
            styles |= {f"{name}.{k}": "rowwise" if k == last else "colwise" for k in linears}
        else:
            styles |= {f"{name}.{k}": "colwise_gather_output" for k in linears}
    return styles


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs)."""
    shape = tuple(linear.get_parameter("weight").shape)
    return (shape[1], shape[0]) if isinstance(linear, nn.Linear) else (shape[0], shape[1])


def apply(plan: TensorPlan, model: Any, group: Group) -> None:
    """Cut `model`, whose parameters have no storage yet. Raises ConfigError where that does not go."""
    if group.size == 1:
        return
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for name, style in plan.styles.items():
        owner, _, last = name.rpartition(".")
        parent = model.get_submodule(owner)
        if last in parent._parameters:
            _cut_parameter(parent, last, style, group)
            continue
        module = model.get_submodule(name)
        if any(uses[p] > 1 for p in module.parameters(recurse=False)):
            continue  # tied to the embedding, which stays whole
        _cut_module(module, name, style, group)


def _cut_module(module: nn.Module, name: str, style: str, group: Group) -> None:
    if style == "colwise_gather_output" and _sizes(module)[1] % group.size:
        return  # it stays whole, which is as right
    cuts: dict[str, Callable[[], None]] = {
        "colwise": lambda: column_parallel(module, group),
        "colwise_gather_output": lambda: column_parallel(module, group, gather=True),
        "colwise_rep": lambda: column_parallel(module, group, gather=True),
        "rowwise": lambda: row_parallel(module, group, reduce=True),
        "rowwise_split_input": lambda: row_parallel(module, group, split=True, reduce=True),
        "rowwise_rep": lambda: row_parallel(module, group, split=True, reduce=True),
        "moe_tp_experts": lambda: cut(module, group, {}, Around(reduce=True)),
        "all_reduce": lambda: cut(module, group, {}, Around(reduce=True)),
        "moe_identity_expert": lambda: cut(module, group, {}, Around(share=True)),
    }
    if style in cuts:
        cuts[style]()
    elif style not in _WHOLE:
        raise ConfigError(f"the tensor-parallel plan cuts {name} by {style!r}, which is not known here")


def _cut_parameter(module: nn.Module, name: str, style: str, group: Group) -> None:
    dims = module.get_parameter(name).dim()
    if style == "colwise":
        cut_parameter(module, name, max(dims - 2, -1) if dims > 1 else -1, group)
    elif style == "packed_colwise":
        cut_parameter(module, name, dims - 2 if dims > 1 else -1, group, packed=2)
    elif style == "rowwise":
        cut_parameter(module, name, -1, group)
    elif style == "packed_rowwise":
        cut_parameter(module, name, -1, group, packed=2)
    elif style not in _WHOLE:
        raise ConfigError(f"the tensor-parallel plan cuts {name} by {style!r}, which is not known here")
