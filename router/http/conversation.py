"""The conversation of a chat's body, as its template gets it. What the template would not show is refused."""

from __future__ import annotations

from router.http.config import ServedModel
from router.http.thoughts import thought_variables
from router.protocol.openai import ChatBody
from router.protocol.validation import path
from router.text.templates import Conversation
from workers.api.errors import InvalidRequest


def conversation_of(body: ChatBody, model: ServedModel) -> Conversation:
    """By the model's own template, unless the body brings one. Raises InvalidRequest."""
    _check_shown(body, model)
    add_prompt = body.add_generation_prompt
    return Conversation(
        [m.as_template() for m in body.messages],
        tools=[tool.model_dump(exclude_none=True) for tool in body.offered_tools] or None,
        add_generation_prompt=not body.continue_final_message if add_prompt is None else add_prompt,
        continue_final_message=bool(body.continue_final_message),
        variables={**thought_variables(body, model), **body.chat_template_kwargs},
        documents=body.documents,
    )


def _check_shown(body: ChatBody, model: ServedModel) -> None:
    chat, source = model.tokenizer.chat, body.chat_template
    if chat is not None and chat.is_form and source is None:
        if body.offered_tools and body.tool_choice in (None, "auto"):
            raise _refusal(
                body,
                ("tools",),
                "this model's chat template is made of pieces, which show no tools; a choice that requires a call is "
                "enforced all the same",
            )
        for i, message in enumerate(body.messages):
            if message.tool_calls:
                at = ("messages", i, "tool_calls")
                raise _refusal(body, at, "this model's chat template is made of pieces, which show no calls")
    if body.documents and "documents" not in (source or model.tokenizer.template_reads):
        raise _refusal(body, ("documents",), "the chat template shows none")


def _refusal(body: ChatBody, at: tuple[str | int, ...], words: str) -> InvalidRequest:
    name = path(body.place(at))
    return InvalidRequest(f"Unsupported parameter: '{name}': {words}.", param=name, code="unsupported_parameter")
