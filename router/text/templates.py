"""Chat templates: jinja2 in an immutable sandbox, with the names and filters that checkpoints' templates rely on.

The environment is the one of transformers' `apply_chat_template` (its documentation, "Writing a chat template"), so
that a checkpoint's template renders here as it does there. The sandbox bounds what a template can reach, not what it
can use: `Renderer` is the seam where a child process with limits takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.api.errors import ConfigError, InvalidRequest

Message = Mapping[str, Any]
_END = "\ue0f0\ue0f1\ue0f0"  # marks where the last message ends; the space shows whether the template strips


class Renderer(Protocol):
    """Messages to prompt text."""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        """The prompt's text. Raises InvalidRequest where the template refuses the messages."""


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


class ChatTemplate:
    """A compiled template. `variables` are the special tokens it may name (`bos_token`, ...).

    `now` is the clock behind `strftime_now`. Raises ConfigError when the template does not compile.
    """

    def __init__(
        self, source: str, variables: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise ConfigError(f"the chat template does not compile: {e}") from e
        self._variables = dict(variables)
        self._knows_developer = "developer" in source

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        """The prompt's text; with `continue_final_message` it ends inside the last message.

        The role `developer` is `system` to templates that do not name it. Raises InvalidRequest where the template
        refuses the messages, with its reason.
        """
        shown = [self._shown(m) for m in messages]
        if continue_final_message:
            shown[-1]["content"] += _END + " "
        try:
            text = self._template.render(
                messages=shown,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as e:
            raise InvalidRequest(f"The chat template refuses these messages: {e}"[:300], param="messages") from e
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            # A template's own mistake, shown by these messages only: theirs to change, not a fault of the server.
            raise InvalidRequest(
                f"The chat template fails on these messages ({type(e).__name__}).", param="messages"
            ) from e
        return self._cut(text) if continue_final_message else text

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
