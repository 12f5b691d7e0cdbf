"""Rotary position embedding: the table of cosines and sines for a checkpoint's rope settings.

Shapes: P positions, R rotary size.
Sources: Su et al., RoFormer, 2021; Chen et al., Extending Context Window by Positional Interpolation, 2023 (linear);
the Llama 3.1 release, 2024 (llama3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workers.api.errors import ConfigError

SCALINGS = ("default", "linear", "llama3", "dynamic")


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """`kind` is one of SCALINGS; `options` are the checkpoint's own keys for it. `trained` is in tokens."""

    theta: float
    trained: int
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> RopeSettings:
        """From a config.json, whose keys are `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        options = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if any(isinstance(value, Mapping) for value in options.values()):
            raise ConfigError("rope_parameters differ between the layers; that is not supported")
        kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
        options.pop("type", None)
        theta = float(options.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
        if kind not in SCALINGS:
            raise ConfigError(f"rope scaling {kind!r} is not supported, only {', '.join(SCALINGS)}")
        partial = float(options.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0)
        if partial != 1.0:
            raise ConfigError(f"partial_rotary_factor {partial} is not supported, only 1")
        return RopeSettings(theta, int(config["max_position_embeddings"]), kind, options)

    def option(self, key: str) -> float:
        """A number of `options`. Raises ConfigError where it is missing."""
        value = self.options.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"rope scaling {self.kind!r} needs a positive {key}, the config has {value!r}")
        return float(value)

    def frequencies(self, size: int, positions: int) -> torch.Tensor:
        """Radians a position of each of the R / 2 pairs, fp32, for a context of `positions` tokens."""
        base = 1.0 / self.theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
        if self.kind == "linear":
            return base / self.option("factor")
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind == "dynamic" and positions > self.trained:
            # The frequencies would depend on each sequence's length, and cached keys would be wrong as it grows.
            raise ConfigError(
                f"dynamic rope scaling is supported up to the trained {self.trained} tokens only; "
                f"set max_model_len to at most that (it is {positions})"
            )
        return base

    def _llama3(self, base: torch.Tensor) -> torch.Tensor:
        factor, low, high = self.option("factor"), self.option("low_freq_factor"), self.option("high_freq_factor")
        trained = self.option("original_max_position_embeddings")
        wavelength = 2 * math.pi / base
        blend = (trained / wavelength - low) / (high - low)
        mixed = (1 - blend) * base / factor + blend * base
        scaled = torch.where(wavelength > trained / low, base / factor, base)
        between = (wavelength >= trained / high) & (wavelength <= trained / low)
        return torch.where(between, mixed, scaled)


class RotaryEmbedding(nn.Module):
    """The table of one model, shared by its layers: cos_sin [P, R] fp32, cosines first."""

    cos_sin: torch.Tensor

    def __init__(self, settings: RopeSettings, size: int, positions: int, *, device: torch.device) -> None:
        super().__init__()
        angles = torch.arange(positions).float()[:, None] * settings.frequencies(size, positions)[None, :]
        table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
        self.register_buffer("cos_sin", table, persistent=False)
