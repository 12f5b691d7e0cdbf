"""Which class runs which architecture. Classes are imported when they are needed.

A package adds models of its own by entry points of the group "echelon.models": name = architecture, value = class.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from workers.api.errors import ConfigError
from workers.models.base import CausalModel

ENTRY_POINT_GROUP = "echelon.models"

_models: dict[str, str | type[CausalModel]] = {
    "LlamaForCausalLM": "workers.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "workers.models.llama:MistralForCausalLM",
    "Qwen2ForCausalLM": "workers.models.llama:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "workers.models.llama:Qwen3ForCausalLM",
}


def register(architecture: str, model: str | type[CausalModel]) -> None:
    """Run `architecture` with `model`: a class, or "module:Class". Later calls replace earlier ones."""
    _models[architecture] = model


def architectures() -> tuple[str, ...]:
    """All that can be run, entry points included, sorted."""
    return tuple(sorted({*_models, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def find(config: Mapping[str, Any]) -> type[CausalModel]:
    """The class for the first known entry of config["architectures"]. Raises ConfigError where there is none."""
    names = config.get("architectures") or []
    for name in names:
        if name in _models:
            return _load(name, _models[name])
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            return _load(name, point.load())
    raise ConfigError(f"no model for architectures {list(names)}; there are: {', '.join(architectures())}")


def _load(name: str, model: Any) -> type[CausalModel]:
    if isinstance(model, str):
        module, _, attribute = model.partition(":")
        try:
            model = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise ConfigError(f"the model of {name}, {module}:{attribute}, cannot be imported: {e}") from e
    if not (isinstance(model, type) and issubclass(model, CausalModel)):
        raise ConfigError(f"the model of {name} is {model!r}, not a subclass of CausalModel")
    return model
