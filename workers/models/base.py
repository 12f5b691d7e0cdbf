"""What a model is to the rest: `forward(input_ids, positions)`, `compute_logits(hidden)`, cache specs, weight rules.

A model is added in one file: a subclass of `CausalModel` whose modules have the names of the checkpoint, but for those
that its `weight_rules` declare, and a line in the registry (or an entry point of the group "echelon.models").

Shapes: T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from workers.api.config import KVCacheSpec
from workers.api.errors import ConfigError
from workers.layers.build import Build


@dataclass(frozen=True, slots=True)
class WeightRule:
    """Checkpoint tensors named like `checkpoint` fill `part` of the parameters named like `parameter`.

    A `*` stands for one segment between dots, the same on both sides in order. `parameter` None: the tensors are known
    and not needed. The first rule that matches counts; a tensor without a rule fills the parameter of its own name.
    """

    checkpoint: str
    parameter: str | None
    part: str = ""

    def target(self, name: str) -> tuple[str | None, str] | None:
        """(parameter, part) of the checkpoint tensor `name`, or None where the rule does not match."""
        match = _pattern(self.checkpoint).fullmatch(name)
        if match is None:
            return None
        return (None if self.parameter is None else _fill(self.parameter, match.groups())), self.part

    def source(self, parameter: str, part: str) -> str | None:
        """The checkpoint tensor that fills `part` of `parameter`, or None where the rule does not match."""
        if self.parameter is None or part != self.part:
            return None
        match = _pattern(self.parameter).fullmatch(parameter)
        return None if match is None else _fill(self.checkpoint, match.groups())


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*", r"([^.]+)"))


def _fill(template: str, values: tuple[str, ...]) -> str:
    parts = template.split("*")
    return "".join(text + value for text, value in zip(parts, (*values, ""), strict=True))


class CausalModel(nn.Module):
    """The base of all models. A subclass sets the attributes below in its constructor.

    `window`s and heads are in `kv_cache_specs`; `max_positions` is the longest context in tokens the checkpoint allows.
    """

    weight_rules: ClassVar[tuple[WeightRule, ...]] = ()

    vocab_size: int
    max_positions: int
    num_layers: int

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__()

    @classmethod
    def context_length(cls, config: Mapping[str, Any]) -> int:
        """Tokens of context that the checkpoint was made for."""
        return int(require(config, "max_position_embeddings"))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids [T], positions [T] (the T tokens of a step, flattened) -> hidden [T, C]."""
        raise NotImplementedError

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, C] -> logits [T, V], on every rank."""
        raise NotImplementedError

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
