"""The public face of Echelon."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cluster import __version__

if TYPE_CHECKING:
    from cluster.client import Handle
    from cluster.pipeline.answers import Response, Session
    from cluster.pipeline.api_client import APIClient, client
    from cluster.pipeline.engine_config import PytorchEngineConfig, TurbomindEngineConfig
    from cluster.pipeline.generation_config import GenerationConfig
    from cluster.pipeline.pipeline import Pipeline, pipeline
    from cluster.pipeline.server_process import Served, serve
    from router.text.chat_classes import MODELS, BaseChatTemplate, ChatTemplateConfig

__all__ = [
    "MODELS",
    "APIClient",
    "BaseChatTemplate",
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "Served",
    "Session",
    "TurbomindEngineConfig",
    "__version__",
    "client",
    "connect",
    "pipeline",
    "serve",
]


# Imported when they are first asked for: `import echelon` costs next to nothing.
_HOMES = {
    **dict.fromkeys(("MODELS", "BaseChatTemplate", "ChatTemplateConfig"), "router.text.chat_classes"),
    **dict.fromkeys(("APIClient", "client"), "cluster.pipeline.api_client"),
    **dict.fromkeys(("PytorchEngineConfig", "TurbomindEngineConfig"), "cluster.pipeline.engine_config"),
    **dict.fromkeys(("Response", "Session"), "cluster.pipeline.answers"),
    **dict.fromkeys(("Pipeline", "pipeline"), "cluster.pipeline.pipeline"),
    **dict.fromkeys(("Served", "serve"), "cluster.pipeline.server_process"),
    "GenerationConfig": "cluster.pipeline.generation_config",
}


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
