"""The models of a cluster file as the front knows them."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.config import ClusterConfig, resolve_model
from cluster.environment import DEMO_MODEL
from router.http.config import ServedModel
from router.parsers.calls import family_of
from router.parsers.reasoning import reasoning_of
from router.text.template_choice import chosen
from router.text.tokenizer import Tokenizer
from workers.api.errors import ConfigError


def served_models(config: ClusterConfig) -> list[ServedModel]:
    """All of the file, in its order. Raises ConfigError."""
    return [served_model(one, resolve_model(one.model.path, one.model.revision)) for one in config.each]


def served_model(config: ClusterConfig, folder: Path) -> ServedModel:
    """The model as the front knows it. Raises ConfigError when nothing says how long its context is.

    The embedded model's chat template comes with this program, and is as harmless: it needs no process of its own.
    """
    template = chosen(config.model.chat_template, config.model.capability)
    harmless = folder == resolve_model(DEMO_MODEL) and template is None
    tokenizer = Tokenizer.from_folder(folder, trust_template=harmless, template=template)
    max_model_len = config.model.max_model_len or tokenizer.context_length
    if max_model_len is None:
        raise ConfigError(f"{folder} does not say its context length: set model.max_model_len")
    return ServedModel(
        config.model_name,
        tokenizer,
        max_model_len,
        created=int(time.time()),
        tool_parser=_named(config.model.tool_call_parser, family_of(tokenizer.template)),
        reasoning_parser=_named(config.model.reasoning_parser, reasoning_of(tokenizer.template)),
    )


def _named(said: str | None, found: str | None) -> str | None:
    return found if said is None else None if said == "none" else said
