"""/tokenize and /detokenize as vLLM documents them, /v1/encode as LMDeploy does."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from router.protocol.fields import Template, TemplateVariables, Texts, TokenIds
from router.protocol.openai import MAX_MESSAGES, ChatMessage
from router.protocol.strict import Harmless, Strict, is_nothing
from router.protocol.validation import Refused

_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")


class TokenizeBody(Strict):
    """POST /tokenize. A `prompt`, or `messages` through the chat template; `model` as in /generate."""

    not_done: ClassVar[dict[str, Harmless]] = {"tools": is_nothing, "mm_processor_kwargs": is_nothing}

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None  # to a prompt; None: yes
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Template = None
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise Refused("Give either 'prompt' or 'messages'.", code="missing_required_parameter", at=("prompt",))
        if self.messages is not None and self.add_special_tokens:
            raise Refused("Invalid '{param}': a chat template writes them itself.", at=("add_special_tokens",))
        if self.prompt is not None:
            for name in _OF_CHATS:
                if getattr(self, name):
                    raise Refused("Invalid '{param}': it belongs to 'messages'.", at=(name,))
        return self

    def as_chat(self) -> dict[str, Any]:
        """The fields of a chat's body."""
        return {"messages": self.messages, **{name: getattr(self, name) for name in _OF_CHATS}}


class DetokenizeBody(Strict):
    """POST /detokenize."""

    tokens: TokenIds
    model: str | None = None


class EncodeBody(Strict):
    """POST /v1/encode. With `do_preprocess` each text is a user's message and goes through the chat template."""

    input: Texts
    model: str | None = None
    do_preprocess: bool | None = None
    add_bos: bool | None = None  # None: yes
