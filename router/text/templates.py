"""Chat templates: jinja2 in an immutable sandbox, with the names and filters that checkpoints' templates rely on.

The environment is the one of transformers' `apply_chat_template` (its documentation, "Writing a chat template"), so
that a checkpoint's template renders here as it does there. The sandbox bounds what a template can reach, not what it
can use: `router.text.rendering` says in which process it runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.api.errors import ConfigError, InvalidRequest

Message = Mapping[str, Any]
# What a conversation's own variables must not be called; a template's special tokens win over them, too.
SET_BY_SERVER = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "chat_template"}
)
FAILED = "chat_template_failed"  # code of the errors of templates that go wrong
_END = "\ue0f0\ue0f1\ue0f0"  # marks where the last message ends; the space shows whether the template strips


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template renders: plain JSON values only. `tools` are function descriptions in OpenAI's form."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the prompt ends inside the last message
    variables: Mapping[str, Any] = field(default_factory=dict)  # that the template may look at (`enable_thinking`, ...)
    documents: Sequence[Mapping[str, str]] | None = None


class TemplateFailure(InvalidRequest):
    """The template went wrong on these messages, rather than refusing them: other messages may pass."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The chat template fails on these messages: {reason}.", param="messages", code=FAILED)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training; serving shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def check_template(source: str) -> None:
    """Raises ConfigError where `source` is no template. It is only read: compiling may already run parts of it."""
    environment = _environment()
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"the chat template does not compile: line {e.lineno}: {e}") from e
    except RecursionError as e:
        raise ConfigError("the chat template does not compile: it is nested too deeply") from e
    for kind, known in ((jinja2.nodes.Filter, environment.filters), (jinja2.nodes.Test, environment.tests)):
        for node in tree.find_all(kind):
            if node.name not in known:
                noun = kind.__name__.lower()
                raise ConfigError(f"the chat template does not compile: line {node.lineno}: no {noun} {node.name!r}")


def names_read(source: str) -> frozenset[str]:
    """Variables that a template looks at, its own included. It is only read. Raises ConfigError as `check_template`."""
    check_template(source)
    names = _environment().parse(source).find_all(jinja2.nodes.Name)
    return frozenset(name.name for name in names if name.ctx == "load")


class ChatTemplate:
    """A compiled template. `variables` are the special tokens it may name (`bos_token`, ...).

    Raises ConfigError when it does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as e:
            raise ConfigError(f"the chat template does not compile: {e}") from e
        self._variables = dict(variables)
        self._knows_developer = "developer" in source

    def render(self, conversation: Conversation, now: datetime) -> str:
        """The prompt's text; `now` is what `strftime_now` shows.

        The role `developer` is `system` to templates that do not name it. Raises InvalidRequest with the template's own
        reason where it refuses the messages, and TemplateFailure where it goes wrong on them.
        """
        shown = [self._shown(m) for m in conversation.messages]
        if conversation.continue_final_message:
            shown[-1]["content"] += _END + " "
        try:
            text = self._template.render(
                {
                    **conversation.variables,
                    "messages": shown,
                    "tools": conversation.tools,
                    "documents": conversation.documents,
                    "add_generation_prompt": conversation.add_generation_prompt,
                    "strftime_now": now.strftime,
                    **self._variables,
                }
            )
        except jinja2.TemplateError as e:
            if type(e) is not jinja2.TemplateError:
                raise TemplateFailure(f"{type(e).__name__}: {e}"[:300]) from e
            raise InvalidRequest(f"The chat template refuses these messages: {e}"[:300], param="messages") from e
        except MemoryError as e:
            raise TemplateFailure("it needs too much memory") from e
        except Exception as e:  # whatever Python raises in a program that is not ours
            raise TemplateFailure(f"it raises {type(e).__name__}") from e
        return self._cut(text) if conversation.continue_final_message else text

    def _shown(self, message: Message) -> dict[str, Any]:
        fields = {k: v for k, v in message.items() if v is not None}
        if fields.get("role") == "developer" and not self._knows_developer:
            fields["role"] = "system"
        return fields

    @staticmethod
    def _cut(text: str) -> str:
        at = text.rfind(_END)
        if at < 0:
            raise InvalidRequest(
                "The chat template drops the final message, so that it cannot be continued.",
                param="continue_final_message",
            )
        kept = text[:at]
        return kept if text.startswith(" ", at + len(_END)) else kept.rstrip()
