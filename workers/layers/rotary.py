"""Rotary position embedding: the table of cosines and sines for a checkpoint's rope settings.

A table is made once, for the context that the server was started with. "longrope" and "qwen_ntk", which depend on a
sequence's length, take that context for it: keys in the cache then stay right as a sequence grows, and are those of
transformers for a sequence that fills the context.

"dynamic" goes by each sequence, as transformers does it for one alone: the tokens of a prompt are rotated by its whole
length, each later one by its own position, and keys stay as they were written. That follows from a token's place and
the prompt's length alone, so that a sequence that is computed again, elsewhere too, gets the same keys. A step's
cosines and sines are made once for all layers.

Shapes: T tokens, P positions, R rotary size.
Sources: Su et al., RoFormer, 2021; Chen et al., Extending Context Window by Positional Interpolation, 2023 (linear);
Peng et al., YaRN, 2023 (yarn, dynamic); Bai et al., Qwen, 2023 (qwen_ntk); Ding et al., LongRoPE, 2024 (longrope); the
Llama 3.1 release, 2024 (llama3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workers.api.errors import ConfigError
from workers.context import AttentionMetadata

SCALINGS = ("default", "linear", "llama3", "dynamic", "yarn", "longrope", "qwen_ntk")


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """`kind` is one of SCALINGS; `options` are the checkpoint's own keys for it. `trained` is in tokens.

    `partial` is the part of a head's channels that is rotated, the first ones.
    """

    theta: float
    trained: int
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    partial: float = 1.0

    @staticmethod
    def from_config(config: Mapping[str, Any], *, layers: str = "", theta: float = 10000.0) -> RopeSettings:
        """From a config.json, whose keys are `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

        `layers` names the layers' type where each type has parameters of its own; `theta` is the family's default.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        options = dict(given.get(layers) or {} if layers in given else given)
        if any(isinstance(value, Mapping) for value in options.values()):
            raise ConfigError("rope_parameters differ between the layers; that is not supported for this model")
        kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
        options.pop("type", None)
        kind = "longrope" if kind == "su" else kind  # its name in 2024
        theta = float(options.pop("rope_theta", None) or config.get("rope_theta") or theta)
        if kind not in SCALINGS:
            raise ConfigError(f"rope scaling {kind!r} is not supported, only {', '.join(SCALINGS)}")
        if not config.get("max_position_embeddings"):
            raise ConfigError("config.json has no max_position_embeddings")
        trained = int(config["max_position_embeddings"])
        if kind in ("longrope", "yarn"):
            options.setdefault(
                "original_max_position_embeddings", config.get("original_max_position_embeddings") or trained
            )
        if kind == "longrope":
            options.setdefault("factor", trained / options["original_max_position_embeddings"])
        partial = float(options.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0)
        return RopeSettings(theta, trained, kind, options, partial)

    def option(self, key: str) -> float:
        """A number of `options`. Raises ConfigError where it is missing."""
        value = self.options.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"rope scaling {self.kind!r} needs a positive {key}, the config has {value!r}")
        return float(value)

    @property
    def reach(self) -> int:
        """The longest context in tokens that the settings are made for."""
        return int(self.trained * self.option("factor")) if self.kind == "dynamic" else self.trained

    def frequencies(self, size: int, positions: int) -> torch.Tensor:
        """Radians a position of each of the R / 2 pairs, fp32, for a context of `positions` tokens."""
        theta = self.theta
        if self.kind == "dynamic" and positions > self.trained:
            factor = self.option("factor")
            theta *= (factor * positions / self.trained - (factor - 1)) ** (size / (size - 2))
        if self.kind == "qwen_ntk" and positions > self.trained:
            alpha = 2 ** math.ceil(math.log2(positions / self.trained) + 1) - 1
            theta *= alpha ** (size / (size - 2))
        base = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
        if self.kind == "linear":
            return base / self.option("factor")
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind == "yarn":
            return self._yarn(base, size)
        if self.kind == "longrope":
            return base / self._longrope(size, positions)
        return base

    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        given = self.options.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self.option("factor")
        if factor <= 1.0:
            return 1.0
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(self.option("original_max_position_embeddings")))
        above, below = self.options.get("mscale"), self.options.get("mscale_all_dim")
        if above and below:
            return yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
        return yarn_magnitude(factor)

    def _llama3(self, base: torch.Tensor) -> torch.Tensor:
        factor, low, high = self.option("factor"), self.option("low_freq_factor"), self.option("high_freq_factor")
        trained = self.option("original_max_position_embeddings")
        wavelength = 2 * math.pi / base
        blend = (trained / wavelength - low) / (high - low)
        mixed = (1 - blend) * base / factor + blend * base
        scaled = torch.where(wavelength > trained / low, base / factor, base)
        between = (wavelength >= trained / high) & (wavelength <= trained / low)
        return torch.where(between, mixed, scaled)

    def _yarn(self, base: torch.Tensor, size: int) -> torch.Tensor:
        """Pairs that turn often within the trained context keep their frequency, those that hardly do are stretched."""
        trained = self.option("original_max_position_embeddings")

        def pair_of(turns: float) -> float:
            return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = pair_of(float(self.options.get("beta_fast") or 32))
        high = pair_of(float(self.options.get("beta_slow") or 1))
        if self.options.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        stretched = (torch.arange(size // 2).float() - low) / max(high - low, 0.001)
        stretched = stretched.clamp(0, 1)
        return base * (1 - stretched) + base / self.option("factor") * stretched

    def _longrope(self, size: int, positions: int) -> torch.Tensor:
        key = "long_factor" if positions > self.option("original_max_position_embeddings") else "short_factor"
        factors = self.options.get(key)
        if not isinstance(factors, list) or len(factors) != size // 2:
            raise ConfigError(f"rope scaling 'longrope' needs {size // 2} numbers as {key}")
        return torch.tensor(factors, dtype=torch.float32)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's correction of the softmax's temperature for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def with_dynamic_scaling(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A config.json whose rope is scaled by the context's length, up to `factor` times the trained one.

    Raises ConfigError where it says how its rope is scaled itself.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = dict(config.get(key) or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if kind != "default" or any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError(f"rope_scaling_factor is for ropes that are not scaled; the checkpoint's is ({key})")
    return {**config, key: {**given, "rope_type": "dynamic", "factor": factor}}


class RotaryEmbedding(nn.Module):
    """The table of one model, shared by its layers: cos_sin [P, R] fp32, cosines first.

    `size` is that of a head; R is the settings' part of it. `interleaved`: see `kernels.rotary`.
    """

    cos_sin: torch.Tensor

    def __init__(
        self, settings: RopeSettings, size: int, positions: int, *, device: torch.device, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.settings = settings
        self.by_length = settings.kind == "dynamic" and positions > settings.trained
        rotated = self._rotated = int(size * settings.partial)
        angles = torch.arange(positions).float()[:, None] * settings.frequencies(rotated, positions)[None, :]
        table = torch.cat([angles.cos(), angles.sin()], dim=-1) * settings.magnitude()
        self.register_buffer("cos_sin", table.to(device), persistent=False)

    def of_step(self, positions: torch.Tensor, step: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T] int64 of a table [T, R], and that table, where the rotation goes `by_length`."""
        known = step.memo.get(self)
        if known is None:
            known = step.memo[self] = (
                torch.arange(len(positions), device=positions.device),
                self._grown(positions, positions.max() + 1 if step.lengths is None else step.lengths),
            )
        rows, table = known
        return rows, table

    def _grown(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        trained, factor, size = self.settings.trained, self.settings.option("factor"), self._rotated
        growth = factor * lengths.clamp(min=trained).double() / trained - (factor - 1)
        theta = (self.settings.theta * growth ** (size / (size - 2))).float()
        exponents = torch.arange(0, size, 2, device=positions.device).float() / size
        angles = positions.float()[:, None] / theta[..., None] ** exponents
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
