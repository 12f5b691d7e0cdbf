"""Which way each architecture is served, and what of it works: for `echelon list`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from workers.models.patch_map import MODULE_MAP
from workers.models.registry import ENTRY_POINT_GROUP, architectures, origin

NATIVE, OUTSIDE, PATCHED, TRANSFORMERS = "native", "out of tree", "patched", "transformers"


@dataclass(frozen=True, slots=True)
class Served:
    """One architecture. `source`: the class, or the patch map's entries; quantization, adapters and images: not yet."""

    architecture: str
    way: str
    source: str
    tensor_parallel: str
    quantization: bool = False
    lora: bool = False
    images: bool = False


def served() -> list[Served]:
    """All that can be named: natives, those of entry points and model files, and transformers' causal models.

    Of transformers' ones it says what their code asks for, not that each was run.
    """
    outside = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    found = {name: Served(name, OUTSIDE if name in outside or not origin(name).startswith("workers.") else NATIVE,
                          origin(name), "yes") for name in architectures()}  # fmt: skip
    for name, module in sorted(_transformers().items()):
        if name in found:
            continue
        entries = [key.rpartition(".")[2] for key in MODULE_MAP if f".{module}.modeling_" in key]
        if entries:
            found[name] = Served(name, PATCHED, f"rewrites of {', '.join(entries)}", "by the rewrites, or derived")
        else:
            found[name] = Served(name, TRANSFORMERS, f"transformers.models.{module}", "derived")
    return [found[name] for name in sorted(found)]


def _transformers() -> dict[str, str]:
    """transformers' causal models whose attention can be ours, and their module; read without importing their code."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    spec = find_spec("transformers.models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    found: dict[str, str] = {}
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = model_type_to_module_name(kind)
        file = root / module / f"modeling_{module}.py"
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        rewritten = any(f".{module}.modeling_" in key for key in MODULE_MAP)
        for name in (names,) if isinstance(names, str) else names:
            if re.search(rf"class {name}\b", text) and ("ALL_ATTENTION_FUNCTIONS.get_interface(" in text or rewritten):
                found[name] = module
    return found
