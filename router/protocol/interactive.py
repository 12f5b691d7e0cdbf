"""/v1/chat/interactive and /v1/chat/interactive_qos: bodies and answers as LMDeploy documents them.

With `interactive_mode`, `session_id` names a session whose history is kept here; without, the prompt is all there is,
and a session of that number starts anew. Images and adapters are refused by name. A stream is JSON objects, one a line:
what LMDeploy's client reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Protocol, Self

from pydantic import Field, model_validator

from router.protocol.answers import ChoiceAnswer, ShownToken, Usage
from router.protocol.fields import Stop
from router.protocol.openai import (
    MAX_MESSAGES,
    MAX_TOKENS,
    ChatBody,
    ChatMessage,
)
from router.protocol.qos_bodies import UserId, without_false_stop
from router.protocol.sse import dumps, quoted
from router.protocol.strict import Harmless, Strict, is_nothing
from router.protocol.validation import Refused, type_name


class InteractiveBody(Strict):
    """POST /v1/chat/interactive. `prompt` as a string is one message of a user.

    `model` (ours) may be left out where the caller may use one only. Without `request_output_len` an answer has as many
    tokens as fit.
    """

    not_done: ClassVar[dict[str, Harmless]] = {
        "image_url": is_nothing,
        "adapter_name": is_nothing,
        "kwargs": is_nothing,  # LMDeploy's client sends it, empty
    }

    prompt: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    session_id: Annotated[int, Field(ge=-1, lt=2**63)] | None = None  # -1: none
    interactive_mode: bool | None = None
    cancel: bool | None = None  # ends the round that runs; nothing else of the body counts
    stream: bool | None = None
    stop: Stop = ()
    request_output_len: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # -1 and 0: off
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _no_tools(self) -> Self:
        for i, message in enumerate(self.prompt):
            if message.tool_calls or message.role == "tool":
                raise Refused("Unsupported parameter: '{param}': tools are for /v1/chat/completions.", at=("prompt", i))
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_documented(cls, data: Any) -> Any:
        data = without_false_stop(data)
        if isinstance(data, dict) and data.get("cancel") is True:
            data = {**data, "prompt": "cancel"}
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

    @model_validator(mode="after")
    def _cancels_a_session(self) -> Self:
        if self.cancel and self.session is None:
            raise Refused("Missing required parameter: '{param}': whose round is to be cancelled?", at=("session_id",))
        return self

    @property
    def session(self) -> int | None:
        """The session that it is about; None: none."""
        return None if self.session_id == -1 else self.session_id

    def as_chat(self, model: str, messages: list[ChatMessage]) -> ChatBody:
        """`messages` for `model` as /v1/chat/completions would be asked, with the defaults that LMDeploy documents."""
        return ChatBody.model_construct(
            model=model,
            messages=messages,
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
        self._counts: dict[str, int] = {}

    def follow(self, choice: Counted, input_tokens: int, history_tokens: int) -> None:
        """The answer is `choice`, to a prompt of `history_tokens` and then `input_tokens`."""
        self._choice = choice
        self._counts = {"input_tokens": input_tokens, "history_tokens": history_tokens}
        self._tail = f',"input_tokens":{input_tokens},"history_tokens":{history_tokens},"finish_reason":'

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
            **self._counts,
            "finish_reason": choice.finish,
        }
        return dumps(fields).encode("ascii")

    def _line(self, text: str, reason: str) -> str:
        assert self._choice is not None
        return f'{{"text":{quoted(text)},"tokens":{self._choice.token_count}{self._tail}{reason}}}\n'


def cancelled() -> bytes:
    """The answer to `cancel`, once no round runs any more."""
    fields = {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": None}
    return dumps(fields).encode("ascii")
