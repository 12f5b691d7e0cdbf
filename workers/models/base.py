"""What a model is to the rest: `forward(input_ids, positions)`, `compute_logits(hidden)`, cache specs, weight rules.

A model is added in one file: a subclass of `CausalModel` whose modules have the names of the checkpoint, but for those
that its `weight_rules` declare, and a line in the registry (or an entry point of the group "echelon.models").

Shapes: T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.sampling import greedy
from workers.api.config import KVCacheSpec
from workers.api.errors import ConfigError
from workers.layers.build import Build


@dataclass(frozen=True, slots=True)
class WeightRule:
    """Checkpoint tensors named like `checkpoint` fill `part` of the parameters named like `parameter`.

    A `*` stands for one segment between dots, the same in the checkpoint and in parameter and part, in order; `**`, at
    the end, for all that follows. What stars of `part` the checkpoint lacks it has in one tensor; `part` None: it has
    all parts in one. `parameter` None: the tensors are known and not needed. The first rule that matches counts; a
    tensor without a rule fills the parameter of its own name.
    """

    checkpoint: str
    parameter: str | None
    part: str | None = ""

    def target(self, name: str) -> tuple[str | None, str | None] | None:
        """(parameter, part) of the checkpoint tensor `name`, or None where the rule does not match."""
        match = _pattern(self.checkpoint).fullmatch(name)
        if match is None or self.parameter is None:
            return None if match is None else (None, self.part)
        stars, values = self.parameter.count("*"), match.groups()
        inside = values[stars:]
        part = None if self.part is None or self.part.count("*") > len(inside) else _fill(self.part, inside)
        return _fill(self.parameter, values[:stars]), part

    def source(self, parameter: str, part: str) -> str | None:
        """The checkpoint tensor that fills `part` of `parameter`, or None where the rule does not match."""
        if self.parameter is None:
            return None
        match = _pattern(self.parameter).fullmatch(parameter)
        inner = None if match is None or self.part is None else _pattern(self.part).fullmatch(part)
        if match is None or (inner is None and self.part is not None):
            return None
        values = match.groups() + (() if inner is None else inner.groups())
        return _fill(self.checkpoint, values[: self.checkpoint.count("*")])


def renamed(prefix: str, onto: str, names: Mapping[str, str]) -> tuple[WeightRule, ...]:
    """Rules for modules that are called otherwise in the checkpoint: `prefix`.NAME.* fills `onto`.OURS.*, all parts."""
    return tuple(WeightRule(f"{prefix}.{name}.*", f"{onto}.{ours}.*", None) for name, ours in names.items())


@functools.lru_cache(maxsize=1024)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*\*", ".+").replace(r"\*", r"([^.]+)"))


def _fill(template: str, values: tuple[str, ...]) -> str:
    parts = template.split("*")
    return "".join(text + value for text, value in zip(parts, (*values, ""), strict=True))


class CausalModel(nn.Module):
    """The base of all models. A subclass sets the attributes below in its constructor.

    `window`s and heads are in `kv_cache_specs`; `max_positions` is the longest context in tokens the checkpoint allows.
    `prompts_apart_from`: keys of prompts of over so many tokens depend on their whole length, None: of none.
    `batch_invariant`: whether a `Build` that asks for it makes a token's result independent of its step's other tokens.
    """

    weight_rules: tuple[WeightRule, ...] = ()

    captures: bool = True  # whether steps may become CUDA graphs
    prompts_apart_from: int | None = None
    batch_invariant: bool = False
    vocab_size: int
    max_positions: int
    num_layers: int

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__()

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """Tokens of context that the checkpoint was made for."""
        return int(require(config, "max_position_embeddings"))

    @classmethod
    def longest_context(cls, config: Mapping[str, Any]) -> int:
        """Tokens of context that max_model_len may ask for: more than `context_length` where scaling is dynamic."""
        return cls.context_length(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids [T], positions [T] (the T tokens of a step, flattened) -> hidden [T, C]."""
        raise NotImplementedError

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, C] -> logits [T, V], on every rank."""
        return self.gather_logits(self.own_logits(hidden))

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, C] -> the part of the logits that this rank computes [T, P]."""
        raise NotImplementedError

    def gather_logits(self, own: torch.Tensor) -> torch.Tensor:
        """The ranks' parts [T, P] -> logits [T, V], on every rank."""
        return own

    def greedy_tokens(self, own: torch.Tensor) -> torch.Tensor:
        """`kernels.sampling.greedy` of the logits of which the ranks have parts [T, P] -> [T], on every rank."""
        return greedy(self.gather_logits(own))

    def read_tensors(self, folder: Path) -> Iterable[tuple[Path, str, Any]] | None:
        """(file, name, view) of the checkpoint's tensors, where they are not simply those of its safetensors files."""
        return None

    def finish_loading(self) -> None:
        """Called once, when all parameters are filled."""

    def kv_cache_specs(self) -> tuple[KVCacheSpec, ...]:
        """Which layers need which cache on this rank; every layer index in one spec."""
        raise NotImplementedError


def require(config: Mapping[str, Any], key: str) -> Any:
    """config[key]. Raises ConfigError where it is missing or null."""
    value = config.get(key)
    if value is None:
        raise ConfigError(f"config.json has no {key}")
    return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json in a model's folder. Raises ConfigError where there is none or it is not one."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"{file} does not exist: the path must be a folder in the Hugging Face layout") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{file} does not hold an object")
    return config
