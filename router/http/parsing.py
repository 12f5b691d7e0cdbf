"""How the answer to one chat is read: which parsers, from what the request asks for and what the model writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.http.config import ServedModel
from router.parsers.calls import FAMILIES, REQUIRED, MarkedCalls, NamedCall, tool_parser
from router.parsers.pieces import Parser, Plain
from router.parsers.reasoning import REASONING_PARSERS, ReasoningParser
from router.protocol.openai import ChatBody
from router.protocol.tools import NamedTool

_TAIL = 16  # tokens of a prompt in which a template opens the thoughts, or closes them


@dataclass(frozen=True, slots=True)
class AnswerParsing:
    """`parser` makes a fresh one for each choice. `shown`: special strings that it has to see. `begins_after`: behind
    that text a grammar begins ("" = at once).
    """

    parser: Callable[[], Parser]
    shown: tuple[str, ...]
    begins_after: str


def answer_parsing(body: ChatBody, model: ServedModel, prompt_ids: tuple[int, ...]) -> AnswerParsing | None:
    """None where all of the answer is content."""
    make, shown = _calls(body, model)
    marks = None if model.reasoning_parser is None else REASONING_PARSERS[model.reasoning_parser]
    if marks is not None:
        tail = model.tokenizer.decode(prompt_ids[-_TAIL:], skip_special_tokens=False).rstrip()
        if not tail.endswith(marks.end):  # else the template has closed them: no thoughts are wanted
            inside, rest, own = tail.endswith(marks.begin), make or Plain, marks
            thoughts = body.include_reasoning is not False
            return AnswerParsing(
                lambda: ReasoningParser(own, rest(), inside=inside, shown=thoughts),
                (*shown, marks.begin, marks.end),
                marks.end,
            )
    return None if make is None else AnswerParsing(make, shown, "")


def _calls(body: ChatBody, model: ServedModel) -> tuple[Callable[[], Parser] | None, tuple[str, ...]]:
    choice, parallel, name = body.tool_choice, body.parallel_tool_calls is not False, model.tool_parser
    if isinstance(choice, NamedTool):
        function = choice.function.name
        return lambda: NamedCall(function), ()
    if choice == "required":
        return lambda: MarkedCalls(REQUIRED, parallel=parallel), ()
    if not body.offered_tools or name is None:
        return None, ()
    return lambda: tool_parser(name, parallel=parallel), FAMILIES[name].markers if name in FAMILIES else ()
