"""Modelling code that lies in a checkpoint's folder: it runs only where the operator says that it is trusted.

The config's `auto_map` names the class, "modeling_x.XForCausalLM". The folder becomes a package of its own, so that its
files import each other as they do on the hub; nothing is copied, nothing is fetched. Its modules then run as those of
transformers do, and the patch map knows them as "modeling_x.Class".
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.api.errors import ConfigError
from workers.models.transformers_model import TransformersForCausalLM

_CAUSAL, _CONFIG = "AutoModelForCausalLM", "AutoConfig"


def remote_file(config: Mapping[str, Any]) -> str | None:
    """The file of the checkpoint that has its causal model, if the config names one."""
    named = (config.get("auto_map") or {}).get(_CAUSAL)
    return None if named is None else f"{str(named).rpartition('.')[0]}.py"


def remote_model(config: Mapping[str, Any], folder: str) -> type[TransformersForCausalLM]:
    """The model of a checkpoint with code of its own. Runs that code. Raises ConfigError where it cannot be had."""
    causal = _load(config, folder, _CAUSAL)
    if not hasattr(causal, "from_pretrained"):
        raise ConfigError(f"{causal.__module__}.{causal.__qualname__} of the checkpoint is no model of transformers")
    if getattr(causal, "config_class", None) is None:
        causal.config_class = _load(config, folder, _CONFIG)
    return type(causal.__name__, (TransformersForCausalLM,), {"__module__": __name__, "causal_class": causal})


def _load(config: Mapping[str, Any], folder: str, what: str) -> Any:
    named = str((config.get("auto_map") or {}).get(what, ""))
    module, _, name = named.rpartition(".")
    if not (module.isidentifier() and name.isidentifier()):
        elsewhere = ": code of another repository is not fetched" if "--" in named else ""
        raise ConfigError(f"auto_map of the checkpoint has {named!r} for {what}, not FILE.CLASS{elsewhere}")
    path = Path(folder).resolve()
    if not (path / f"{module}.py").is_file():
        raise ConfigError(f"auto_map of the checkpoint names {module}.py, which is not in {path}")
    try:
        return getattr(importlib.import_module(f"{_package(path)}.{module}"), name)
    except Exception as e:  # what a stranger's file does when it is imported, nobody knows
        raise ConfigError(f"{named} of the checkpoint cannot be imported: {type(e).__name__}: {e}") from e


def _package(folder: Path) -> str:
    """The name of the package that the folder is in this process."""
    name = f"echelon_checkpoint_{hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name
