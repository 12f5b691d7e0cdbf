"""/v1/chat/interactive and /v1/chat/interactive_qos: bodies and answers as LMDeploy documents them.

No history is kept on the server: what needs it (`interactive_mode`, `cancel`) is refused by name, and so are images and
adapters. `session_id` has no meaning without it and is taken as it stands. A stream is JSON objects, one a line: what
LMDeploy's client reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, model_validator

from router.protocol.answers import ChoiceAnswer, ShownToken, Usage
from router.protocol.fields import Stop
from router.protocol.openai import (
    MAX_MESSAGES,
    MAX_TOKENS,
    ChatBody,
    ChatMessage,
    Harmless,
    Strict,
    is_false,
    is_nothing,
)
from router.protocol.qos_bodies import UserId, is_integer, without_false_stop
from router.protocol.sse import dumps, quoted
from router.protocol.validation import Refused, type_name


class InteractiveBody(Strict):
    """POST /v1/chat/interactive. `prompt` as a string is one message of a user.

    `model` (ours) may be left out where the caller may use one only. Without `request_output_len` an answer has as many
    tokens as fit.
    """

    not_done: ClassVar[dict[str, Harmless]] = {
        "session_id": is_integer,
        "interactive_mode": is_false,
        "cancel": is_false,
        "image_url": is_nothing,
        "adapter_name": is_nothing,
        "kwargs": is_nothing,  # LMDeploy's client sends it, empty
    }

    prompt: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    stream: bool | None = None
    stop: Stop = ()
    request_output_len: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # -1 and 0: off
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_documented(cls, data: Any) -> Any:
        data = without_false_stop(data)
        if not isinstance(data, dict) or "prompt" not in data or isinstance(data["prompt"], list):
            return data
        if not isinstance(data["prompt"], str):
            raise Refused(
                "Invalid type for '{param}': expected a string or an array of messages, but got "
                f"{type_name(data['prompt'])} instead.",
                code="invalid_type",
                at=("prompt",),
            )
        return {**data, "prompt": [{"role": "user", "content": data["prompt"]}]}

    def as_chat(self, model: str) -> ChatBody:
        """The same for `model` as /v1/chat/completions would be asked, with the defaults that LMDeploy documents."""
        return ChatBody.model_construct(
            model=model,
            messages=self.prompt,
            stream=self.stream,
            stop=self.stop,
            max_tokens=self.request_output_len,
            top_p=0.8 if self.top_p is None else self.top_p,
            top_k=40 if self.top_k is None else self.top_k,
            temperature=0.8 if self.temperature is None else self.temperature,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
        )


class InteractiveQosBody(InteractiveBody):
    """POST /v1/chat/interactive_qos."""

    user_id: UserId | None = None


class Counted(Protocol):
    """A choice as it grows."""

    @property
    def token_count(self) -> int:
        """Tokens so far."""


class InteractiveFormat:
    """One choice: what is new of its text, and how many tokens it, the prompt and the history have."""

    content_type = b"application/x-ndjson"
    done = ""

    def __init__(self) -> None:
        self._choice: Counted | None = None
        self._tail = ""

    def follow(self, choice: Counted, input_tokens: int) -> None:
        """The answer is `choice`, to a prompt of `input_tokens`."""
        self._choice = choice
        self._tail = f',"input_tokens":{input_tokens},"history_tokens":0,"finish_reason":'

    def opening(self, index: int) -> str:
        """Nothing."""
        return ""

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """New text."""
        return self._line(text, "null")

    def finish(self, index: int, reason: str) -> str:
        """No text, the reason."""
        return self._line("", quoted(reason))

    def usage(self, usage: Usage) -> str:
        """It is in every line."""
        return ""

    def error(self, body: bytes) -> str:
        """The last line of a stream that failed."""
        return body.decode("ascii") + "\n"

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        (choice,) = choices
        fields = {
            "text": choice.text,
            "tokens": usage.completion_tokens,
            "input_tokens": usage.prompt_tokens,
            "history_tokens": 0,
            "finish_reason": choice.finish,
        }
        return dumps(fields).encode("ascii")

    def _line(self, text: str, reason: str) -> str:
        assert self._choice is not None
        return f'{{"text":{quoted(text)},"tokens":{self._choice.token_count}{self._tail}{reason}}}\n'
