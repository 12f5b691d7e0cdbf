"""What a checkpoint's folder says about its text: its tokenizer, its settings, its chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from workers.api.errors import ConfigError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextFacts:
    """`eos_ids` end an answer; `named_tokens` are the special strings that a template may name; None = not said.

    `context_length` is in tokens, `vocab_size` counts ids.
    """

    eos_ids: tuple[int, ...]
    context_length: int | None
    vocab_size: int | None
    chat_template: str | None
    named_tokens: dict[str, str]


def read_backend(root: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the folder. Raises ConfigError when it is missing or broken."""
    path = root / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{root} has no tokenizer.json. Save one there with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"{path} cannot be read: {e}") from e


def read_facts(root: Path, backend: tokenizers.Tokenizer) -> TextFacts:
    """What the folder's other files say. Raises ConfigError when one is broken."""
    settings = _read_json(root / "tokenizer_config.json")
    generation = _read_json(root / "generation_config.json")
    model = _read_json(root / "config.json")
    text_model = model.get("text_config", model)
    return TextFacts(
        eos_ids=_eos_ids(backend, generation, model, settings),
        context_length=_context_length(text_model),
        vocab_size=text_model.get("vocab_size"),
        chat_template=_template_source(root, settings),
        named_tokens=_named_tokens(settings),
    )


def has_template(root: Path) -> bool:
    """Whether the folder brings a chat template. Raises ConfigError where it cannot be read."""
    return _template_source(root, _read_json(root / "tokenizer_config.json")) is not None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold an object")
    return value


def _template_source(root: Path, settings: dict[str, Any]) -> str | None:
    if (root / "chat_template.jinja").is_file():
        return (root / "chat_template.jinja").read_text("utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several under names
        named = {t["name"]: t["template"] for t in source}
        source = named.get("default")
    return source


def _token_string(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {name: _token_string(settings.get(name)) for name in _NAMED}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):  # a model's own, under names that its template may use
        found |= {name: _token_string(token) for name, token in extra.items()}
    return {name: text for name, text in found.items() if text is not None}


def _eos_ids(backend: tokenizers.Tokenizer, *configs: dict[str, Any]) -> tuple[int, ...]:
    """generation_config's (or else config's) ids, then the tokenizer's own eos_token."""
    ids: list[int] = []
    for config in configs[:-1]:
        value = config.get("eos_token_id")
        if value is not None:
            ids += value if isinstance(value, list) else [value]
            break
    text = _token_string(configs[-1].get("eos_token"))
    own = backend.token_to_id(text) if text is not None else None
    if own is not None:
        ids.append(own)
    return tuple(dict.fromkeys(ids))


def _context_length(model: dict[str, Any]) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(model.get(name), int):
            return int(model[name])
    return None
