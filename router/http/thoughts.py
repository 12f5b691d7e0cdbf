"""How a model is told to think, or not to, or how hard: through variables that its chat template reads, if it does."""

from __future__ import annotations

from typing import Any

from router.http.config import ServedModel
from router.protocol.openai import ChatBody
from router.protocol.validation import path
from workers.api.errors import InvalidRequest

SWITCHES = ("enable_thinking", "thinking")  # what templates call it
EFFORT = "reasoning_effort"


def thought_variables(body: ChatBody, model: ServedModel) -> dict[str, Any]:
    """What the template is told. Raises InvalidRequest where it would not hear of it."""
    variables: dict[str, Any] = {}
    effort, thinks = body.reasoning_effort, body.thinks
    if effort is None and thinks is None:
        return variables
    source = body.chat_template
    known = (*SWITCHES, EFFORT)
    reads = model.tokenizer.template_reads if source is None else frozenset(n for n in known if n in source)
    if effort not in (None, "none"):
        if EFFORT not in reads:
            raise _refusal(body, (EFFORT,), "the model's chat template does not ask how hard to think")
        variables[EFFORT] = effort
    if thinks is None:
        return variables
    switch = next((name for name in SWITCHES if name in reads), None)
    if switch is not None:
        variables[switch] = thinks
    elif thinks != (model.reasoning_parser is not None):
        words = "this model shows no thoughts" if thinks else "the model's chat template cannot switch its thoughts off"
        raise _refusal(body, (EFFORT,) if effort == "none" else ("thinking",), words)
    return variables


def _refusal(body: ChatBody, at: tuple[str | int, ...], words: str) -> InvalidRequest:
    name = path(body.place(at))
    return InvalidRequest(f"Unsupported parameter: '{name}': {words}.", param=name, code="unsupported_parameter")
