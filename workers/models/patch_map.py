"""Which modules of transformers are rewritten, and by what.

A key names a module's class: in full ("transformers.models.llama.modeling_llama.LlamaMLP"), for code that came with a
checkpoint by its file ("modeling_internlm.InternLMMLP"), or by the class name alone; the first of these that is in the
map counts. A value is the class that holds the rewrite, or its dotted name, which is imported when it is needed.

More entries: `MODULE_MAP.update({...})` in a file given by `--model-file`, or in a package whose entry point of the
group "echelon.models" is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torch import nn

from workers.api.errors import ConfigError

_REWRITES = "workers.models.rewrites"

MODULE_MAP: dict[str, str | type[nn.Module]] = {
    "transformers.models.llama.modeling_llama.LlamaAttention": f"{_REWRITES}.llama.LlamaAttention",
    "transformers.models.llama.modeling_llama.LlamaMLP": f"{_REWRITES}.llama.LlamaMLP",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": f"{_REWRITES}.llama.LlamaRMSNorm",
    "transformers.models.gptj.modeling_gptj.GPTJAttention": f"{_REWRITES}.gptj.GPTJAttention",
    "transformers.models.gptj.modeling_gptj.GPTJMLP": f"{_REWRITES}.gptj.GPTJMLP",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": f"{_REWRITES}.gptj.CodeGenAttention",
    "transformers.models.codegen.modeling_codegen.CodeGenMLP": f"{_REWRITES}.gptj.GPTJMLP",
}
_OURS = frozenset(MODULE_MAP)


def key_for(cls: type) -> str | None:
    """The key of the map that stands for modules of class `cls`."""
    file = cls.__module__.rpartition(".")[2]
    names = (f"{cls.__module__}.{cls.__qualname__}", f"{file}.{cls.__qualname__}", cls.__qualname__)
    return next((name for name in names if name in MODULE_MAP), None)


def rewrite_for(key: str) -> type[nn.Module]:
    """The class of an entry. Raises ConfigError where it is none, or cannot be imported."""
    found: object = MODULE_MAP[key]
    if isinstance(found, str):
        module, _, name = found.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise ConfigError(f"the rewrite of {key}, {MODULE_MAP[key]}, cannot be imported: {e}") from e
    if not isinstance(found, type):
        raise ConfigError(f"the rewrite of {key} is {found!r}, not a class")
    return found


def missed(used: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Entries that should have matched a module of the model just patched, and did not.

    Those are all that came from outside, and of ours those for the Python modules (`modules`) the model is made of.
    """
    used, modules = set(used), set(modules)
    return [key for key in MODULE_MAP
            if key not in used and (key not in _OURS or key.rpartition(".")[0] in modules)]  # fmt: skip
