"""Chat templates of users: a config of pieces (`ChatTemplateConfig`), and registered Python classes (`MODELS`).

The names and fields are LMDeploy's, so that its JSON files and classes work as they are. They come from whoever runs
this program: a class runs in this process.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from router.text.chat_form import CAPABILITIES, ChatForm
from router.text.families import FAMILIES
from router.text.templates import ChatTemplate, Conversation, Message
from workers.api.errors import ConfigError, InvalidRequest

PIECES = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator")


class BaseChatTemplate:
    """A template of pieces (see `ChatForm`) that subclasses fill in. One that overrides `messages2prompt` or
    `get_prompt` writes its prompts itself.
    """

    def __init__(
        self,
        *,
        system: str = "",
        meta_instruction: str | None = None,
        eosys: str = "",
        user: str = "",
        eoh: str = "",
        assistant: str = "",
        eoa: str = "",
        separator: str = "",
        capability: str = "chat",
        stop_words: Sequence[str] | None = None,
    ) -> None:
        self.system, self.meta_instruction, self.eosys = system, meta_instruction, eosys
        self.user, self.eoh, self.assistant, self.eoa = user, eoh, assistant, eoa
        self.separator, self.capability, self.stop_words = separator, capability, stop_words

    @property
    def form(self) -> ChatForm:
        """The pieces as they are now."""
        pieces = {name: getattr(self, name) for name in PIECES}
        return ChatForm(**pieces, capability=self.capability, stop_words=tuple(self.stop_words or ()))

    @property
    def writes_itself(self) -> bool:
        """Whether a subclass has methods of its own for prompts."""
        own, base = type(self), BaseChatTemplate
        return own.messages2prompt is not base.messages2prompt or own.get_prompt is not base.get_prompt

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        """The text for one question: the first one, or a later one, which follows an answer."""
        if not sequence_start and self.capability == "chat":
            return f"{self.separator}{self.user}{prompt}{self.eoh}{self.assistant}"
        return self._render([{"role": "user", "content": prompt}])

    def messages2prompt(self, messages: str | Sequence[Message], sequence_start: bool = True) -> str:
        """The text for a conversation, or for one question."""
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        return self._render(messages)

    def _render(self, messages: Sequence[Message]) -> str:
        return ChatTemplate(self.form.as_jinja(), {}).render(Conversation(messages), datetime.now())


class ClassRenderer:
    """A `Renderer`: the prompts that a template's own methods write. `leading` comes in front of them, once."""

    def __init__(self, template: BaseChatTemplate, leading: str) -> None:
        self._template, self._leading = template, leading

    def start(self) -> None:
        """Nothing to do."""

    async def render(self, conversation: Conversation) -> str:
        """The prompt's text. Raises InvalidRequest for what such a class has no method for, or where it fails."""
        if not conversation.add_generation_prompt or conversation.continue_final_message or conversation.tools:
            raise InvalidRequest("This model's chat template is a class: its prompts end where an answer begins.")
        messages = [{k: v for k, v in m.items() if v is not None} for m in conversation.messages]
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        try:
            text = self._template.messages2prompt(messages[0]["content"] if alone else messages)
        except Exception as e:  # whatever Python raises in a program that is not ours
            raise InvalidRequest(f"The chat template fails on these messages: {type(e).__name__}: {e}"[:300]) from e
        return text if text.startswith(self._leading) else self._leading + text

    def close(self) -> None:
        """Nothing to do."""


class Registry:
    """Template classes by name; `names` has the built-in families besides."""

    def __init__(self) -> None:
        self._classes: dict[str, type[BaseChatTemplate]] = {}

    def register_module(self, name: str) -> Callable[[type[BaseChatTemplate]], type[BaseChatTemplate]]:
        """A decorator: the class is the template of that name from now on, also in the place of a built-in one."""

        def register(kind: type[BaseChatTemplate]) -> type[BaseChatTemplate]:
            if not (isinstance(kind, type) and issubclass(kind, BaseChatTemplate)):
                raise ConfigError(f"the chat template {name!r} must be a subclass of BaseChatTemplate")
            self._classes[name] = kind
            return kind

        return register

    def get(self, name: str) -> ChatForm | BaseChatTemplate | None:
        """The template of that name; None where there is none. Raises ConfigError where its class fails."""
        kind = self._classes.get(name)
        if kind is None:
            return FAMILIES.get(name)
        try:
            return kind()
        except Exception as e:
            raise ConfigError(f"the chat template {name!r} cannot be made: {type(e).__name__}: {e}") from e

    @property
    def names(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted({*FAMILIES, *self._classes}))

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of classes, in the order in which they came."""
        return tuple(self._classes)


MODELS = Registry()


@dataclass
class ChatTemplateConfig:
    """A chat template by name, or by its pieces (see `ChatForm`).

    `model_name` is the name of a built-in or registered template, whose pieces are changed by those given here, or a
    new one, which has no other pieces. Raises ConfigError for a capability that there is not.
    """

    model_name: str
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: list[str] | None = None

    def __post_init__(self) -> None:
        if self.capability not in (None, *CAPABILITIES):
            raise ConfigError(f"capability {self.capability!r} is not one of {', '.join(CAPABILITIES)}")
        for name in ("model_name", *PIECES):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "model_name"):
                raise ConfigError(f"chat template: {name} must be a string, not {value!r}")
        words = self.stop_words
        if words is not None and not (isinstance(words, list | tuple) and all(isinstance(w, str) and w for w in words)):
            raise ConfigError(f"chat template: stop_words must be a list of strings, not {words!r}")

    @classmethod
    def from_json(cls, file_or_string: str | Path) -> ChatTemplateConfig:
        """From a JSON file, or from JSON itself. Raises ConfigError."""
        text, source = str(file_or_string), "the chat template"
        if not text.lstrip().startswith("{"):
            source = text
            try:
                text = Path(text).expanduser().read_text("utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"cannot read the chat template {source}: {e}") from e
        try:
            values = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"{source} is not JSON: {e}") from e
        return cls.from_dict(values, source)

    @classmethod
    def from_dict(cls, values: Any, source: str = "the chat template") -> ChatTemplateConfig:
        """From a JSON object. Raises ConfigError, which names `source`."""
        if not isinstance(values, Mapping) or "model_name" not in values:
            raise ConfigError(f"{source} must be a JSON object with model_name: the name of a template, or a new one")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
                raise ConfigError(f"{source}: there is no field {name!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def portable(self) -> dict[str, Any]:
        """`to_dict` for other processes: of a class that is registered here, its pieces.

        Raises ConfigError for a class that writes its prompts itself.
        """
        if self.model_name not in MODELS.registered:
            return self.to_dict()
        form = self.chat_template
        if isinstance(form, BaseChatTemplate):
            raise ConfigError(
                f"the chat template {self.model_name!r} is a class of this process: put it into a Python file, and "
                "name that (chat_template='FILE.py', --chat-template FILE.py)"
            )
        pieces = {name: getattr(form, name) for name in (*PIECES, "capability")}
        return {
            "model_name": self.model_name,
            **{name: value for name, value in pieces.items() if value is not None},
            "stop_words": list(form.stop_words),
        }

    @property
    def chat_template(self) -> ChatForm | BaseChatTemplate:
        """The template. Raises ConfigError."""
        changed = {k: v for k, v in self.to_dict().items() if k != "model_name"}
        template = MODELS.get(self.model_name)
        if isinstance(template, BaseChatTemplate):
            for name, value in changed.items():
                setattr(template, name, value)
            return template if template.writes_itself else template.form
        if "assistant" in changed:
            changed["opening"] = None
        if "stop_words" in changed:
            changed["stop_words"] = tuple(changed["stop_words"])
        return replace(template or ChatForm(), **changed)
