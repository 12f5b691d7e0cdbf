"""The public face of Echelon."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.client import Handle
    from router.text.chat_classes import MODELS, BaseChatTemplate, ChatTemplateConfig

__all__ = ["MODELS", "BaseChatTemplate", "ChatTemplateConfig", "connect"]

__version__ = "0.1.0"


# Imported when they are first asked for: `import echelon` costs next to nothing.
_HOMES = dict.fromkeys(("MODELS", "BaseChatTemplate", "ChatTemplateConfig"), "router.text.chat_classes")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'echelon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def connect(address: str | None = None, *, api_key: str | None = None) -> Handle:
    """A handle on a running cluster, through Ray: `ray.get(connect().generate.remote("3 + 4 ="))`.

    See `cluster.client.connect`.
    """
    from cluster.client import connect as join

    return join(address, api_key=api_key)
