"""Filling a model: from safetensors files, straight into this rank's shards, or with seeded numbers ("dummy").

The model declares every tensor that it needs (`targets`); a file's tensor is read by slices, so that a rank reads its
own bytes only. Whatever is missing, left over, of the wrong shape or not finite is a WeightError that names it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from workers.api.errors import WeightError
from workers.layers.build import Loadable
from workers.models.base import CausalModel
from workers.quant.method import Part

Progress = Callable[[int, int], None]  # bytes of parameters filled, and in all
DUMMY_SCALE = 0.02
_NAMED = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Target:
    """Where one checkpoint tensor goes: parts, by id, of parameter `name` of `module`. Most often it is one."""

    module: nn.Module
    parameter: nn.Parameter
    name: str
    parts: Mapping[str, Part]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole checkpoint tensor."""
        return next(iter(self.parts.values())).shape

    @property
    def nbytes(self) -> int:
        """What it fills of parameters on this rank."""
        elements = sum(math.prod(s.stop - s.start for s in part.source) for part in self.parts.values())
        return elements * self.parameter.element_size()

    def put(self, whole: Any) -> list[torch.Tensor]:
        """Load the slices that this rank needs of the checkpoint tensor, or of a view that can be sliced like it.

        Returns what was read, for checks.
        """
        read: list[torch.Tensor] = []
        for part_id, part in self.parts.items():
            if any(s.start == s.stop for s in part.source):
                continue
            tensor = whole[part.source].to(self.parameter.device)
            if isinstance(self.module, Loadable):
                self.module.load(self.name, part_id, tensor)
            else:
                self.parameter.copy_(tensor)
            read.append(tensor)
        return read


def targets(model: CausalModel) -> dict[str, Target]:
    """All checkpoint tensors that fill `model`, by name; shared parameters count once."""
    found: dict[str, Target] = {}
    gathered: dict[str, dict[str, Part]] = {}
    for path, parameter in model.named_parameters():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        parts = module.parts(name) if isinstance(module, Loadable) else {"": Part.whole(tuple(parameter.shape))}
        for part_id, part in parts.items():
            sources = (rule.source(path, part_id) for rule in model.weight_rules)
            source = next((s for s in sources if s is not None), path)
            of_tensor = gathered.setdefault(source, {})
            of_tensor[part_id] = part
            found[source] = Target(module, parameter, name, of_tensor)
    return found


def load_model(
    model: CausalModel, path: str, *, load_format: str = "safetensors", seed: int = 0, progress: Progress | None = None
) -> int:
    """Fill all parameters of `model` from the folder `path`; returns the bytes read. Raises WeightError."""
    with torch.inference_mode():
        wanted = targets(model)
        report = progress or (lambda _done, _total: None)
        if load_format == "dummy":
            read = _load_dummy(wanted, seed, report)
        else:
            read = _load_files(model, wanted, Path(path), report)
        for module in model.modules():
            if isinstance(module, Loadable):
                module.finish()
        model.finish_loading()
    return read


def _load_dummy(wanted: Mapping[str, Target], seed: int, report: Progress) -> int:
    read = filled = 0
    total = sum(target.nbytes for target in wanted.values())
    for name, target in wanted.items():
        # Whole tensors, each with a seed of its own: every tp size then holds shards of the same model.
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        parameter = target.parameter
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = torch.empty(target.shape, dtype=parameter.dtype, device=parameter.device)
        if name.endswith("norm.weight"):
            whole.fill_(1.0)
        else:
            whole.normal_(0.0, DUMMY_SCALE, generator=generator)
        read += sum(tensor.nbytes for tensor in target.put(whole))
        filled += target.nbytes
        report(filled, total)
    return read


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, else all."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightError(f"{index} is not an index of safetensors files: {e}") from e
        files = [folder / str(name) for name in names]
        for file in files:
            if file.parent != folder or not file.exists():
                raise WeightError(f"{index} names {file.name!r}, which is not in the folder")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightError(f"{folder} holds no safetensors files (other formats are not read)")
    return files


def _load_files(model: CausalModel, wanted: Mapping[str, Target], folder: Path, report: Progress) -> int:
    loaded: dict[str, Path] = {}
    unused: list[str] = []
    checks: list[tuple[str, Path, torch.Tensor]] = []
    tied = _tied_names(model)
    read = filled = 0
    total = sum(target.nbytes for target in wanted.values())
    for file, name, view in model.read_tensors(folder) or _tensors(_files(folder)):
        target = wanted.get(name)
        if target is None:
            if name not in tied and not _ignored(model, name):
                unused.append(f"{name} in {file.name}")
            continue
        if name in loaded:
            raise WeightError(f"tensor {name} is in both {loaded[name].name} and {file.name}")
        shape = tuple(view.get_shape())
        if shape != target.shape:
            raise WeightError(
                f"tensor {name} in {file.name} has shape {list(shape)}, the model needs {list(target.shape)}"
            )
        loaded[name] = file
        for tensor in target.put(view):
            read += tensor.nbytes
            if tensor.is_floating_point():
                # A sum is finite only if all terms are; it reads the tensor once and makes no copy of it.
                checks.append((name, file, tensor.sum(dtype=torch.float32)))
        filled += target.nbytes
        report(filled, total)
    missing = [name for name in wanted if name not in loaded]
    if missing:
        raise WeightError(f"missing in the checkpoint {folder}: {_some(missing)}")
    if unused:
        raise WeightError(f"the model has no place for: {_some(unused)}")
    _check_finite(checks)
    return read


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Any]]:
    """(file, tensor name, sliceable view) of all tensors."""
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield file, name, opened.get_slice(name)
        except (SafetensorError, OSError) as e:
            raise WeightError(f"{file} cannot be read: {e}") from e


def _check_finite(checks: list[tuple[str, Path, torch.Tensor]]) -> None:
    """One wait for the device for all tensors."""
    if checks:
        finite = torch.stack([total for _, _, total in checks]).isfinite().tolist()
        bad = [f"{name} in {file.name}" for (name, file, _), ok in zip(checks, finite, strict=True) if not ok]
        if bad:
            raise WeightError(f"not all numbers are finite in: {_some(bad)}")


def _ignored(model: CausalModel, name: str) -> bool:
    """Whether the first rule that matches says that the tensor is not needed."""
    for rule in model.weight_rules:
        target = rule.target(name)
        if target is not None:
            return target[0] is None
    return False


def _tied_names(model: CausalModel) -> set[str]:
    """Second names of shared parameters: a checkpoint may hold them or not."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
