"""Which chat template a model gets, where an operator says one: by name, by file, or by its pieces."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from router.text.chat_classes import MODELS, BaseChatTemplate, ChatTemplateConfig, ClassRenderer
from router.text.chat_form import INFILLING, ChatForm
from router.text.rendering import DirectRenderer, Renderer
from router.text.templates import ChatTemplate
from workers.api.errors import ConfigError

Template = ChatForm | BaseChatTemplate | str  # a string is jinja
SUFFIXES = (".json", ".jinja", ".py")


def inlined(said: str) -> str | dict[str, Any]:
    """What `--chat-template` says, without files that other hosts may lack: names and Python files stay as they are.

    Raises ConfigError where a file cannot be read.
    """
    path = Path(said).expanduser()
    if path.suffix == ".json" or said.lstrip().startswith("{"):
        return ChatTemplateConfig.from_json(said).to_dict()
    if path.suffix == ".jinja":
        try:
            return {"jinja": path.read_text("utf-8")}
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read the chat template {path}: {e}") from e
    return str(path.absolute()) if path.suffix == ".py" else said


def chosen(said: str | Mapping[str, Any] | None, capability: str | None) -> Template | None:
    """The template that `said` names, or holds; None: the checkpoint's own. Raises ConfigError.

    `capability` None = the template's.
    """
    plain = None if capability is None or capability == "chat" else ChatForm(capability=capability)
    if said is None:
        return plain
    if isinstance(said, str) and said.endswith(SUFFIXES[:2]):
        said = inlined(said)
    if isinstance(said, Mapping) and set(said) == {"jinja"}:
        return plain or str(said["jinja"])
    if isinstance(said, Mapping):
        config = ChatTemplateConfig.from_dict(said)
    else:
        config = ChatTemplateConfig(_import(said) if said.endswith(".py") else _known(said))
    return ChatTemplateConfig(**{**config.to_dict(), "capability": capability or config.capability}).chat_template


def _known(name: str) -> str:
    if name in MODELS.names:
        return name
    near = difflib.get_close_matches(name, MODELS.names, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`echelon list` shows them"
    raise ConfigError(f"there is no chat template {name!r}, and no such file (.json, .jinja or .py): {hint}")


def _import(path: str) -> str:
    """Run a Python file that registers a template; its name, the last one's of several. Raises ConfigError."""
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"echelon_chat_template_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"the chat template {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ConfigError(f"the chat template {path} cannot be imported: {type(e).__name__}: {e}") from e
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseChatTemplate)]
    names = [name for name in MODELS.registered if type(MODELS.get(name)) in kinds]
    if not names:
        raise ConfigError(
            f"{path} registers no chat template: it needs a class under @MODELS.register_module(name=...)"
        )
    return names[-1]


def leading_specials(backend: tokenizers.Tokenizer) -> str:
    """The special tokens that the tokenizer puts in front of any text."""
    encoding = backend.encode("a", add_special_tokens=True)
    count = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    return "".join(encoding.tokens[:count])


def renderer_of(template: ChatForm | BaseChatTemplate, backend: tokenizers.Tokenizer) -> tuple[Renderer, ChatForm]:
    """What renders `template` for the tokenizer, and its form with all its stop words. Raises ConfigError.

    A form's prompts are made here: what becomes of it is as harmless as it is.
    """
    leading = leading_specials(backend)
    if isinstance(template, BaseChatTemplate):
        return ClassRenderer(template, leading), template.form
    infilling: tuple[str, ...] = ()
    if template.capability == "infilling":
        there = [one for one in INFILLING if all(backend.token_to_id(token) is not None for token in one[:3])]
        if not there:
            raise ConfigError(
                "the tokenizer has no tokens for infilling: neither Code Llama's (▁<PRE>), nor StarCoder's, Qwen's or "
                "DeepSeek's"
            )
        infilling = there[0]
        template = replace(template, stop_words=(*template.stop_words, infilling[3]))
    return DirectRenderer(ChatTemplate(template.as_jinja(leading, infilling), {})), template
