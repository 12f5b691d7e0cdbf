"""/generate: text or token ids in, text and token ids out, as LMDeploy documents it.

A stream is server-sent events with what is new in each, and `[DONE]` at its end. The token that ends an answer is
counted but not shown, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from router.protocol.answers import ChoiceAnswer, ShownToken, Usage, finite
from router.protocol.fields import BadWords, Stop, TokenIds
from router.protocol.openai import MAX_TOKENS, CompletionBody
from router.protocol.qos_bodies import is_integer
from router.protocol.sse import CONTENT_TYPE, DONE, dumps, error_event, event
from router.protocol.strict import Harmless, Strict, is_nothing
from router.protocol.validation import Refused

DEFAULT_TOKENS = 128  # as documented there


class GenerateBody(Strict):
    """POST /generate. Either `prompt` or `input_ids`; `model` (ours) may be left out where the caller has one only."""

    not_done: ClassVar[dict[str, Harmless]] = {"session_id": is_integer, "image_data": is_nothing}

    prompt: str | None = None
    input_ids: TokenIds = ()
    model: str | None = None
    return_logprob: bool | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: Stop = ()
    stop_token_ids: TokenIds = ()
    bad_words: BadWords = ()
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (not self.input_ids):
            raise Refused("Give either 'prompt' or 'input_ids'.", code="missing_required_parameter", at=("prompt",))
        if self.min_tokens and self.min_tokens > self.limit:
            raise Refused(f"Invalid '{{param}}': expected a value <= max_tokens ({self.limit}).", at=("min_tokens",))
        return self

    @property
    def limit(self) -> int:
        """Tokens asked for."""
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    def as_completion(self, model: str) -> CompletionBody:
        """The same for `model` as /v1/completions would be asked. Log-probabilities bring the ids along."""
        return CompletionBody.model_construct(
            model=model,
            prompt=(self.input_ids if self.prompt is None else self.prompt,),
            max_tokens=self.limit,
            logprobs=0,
            **{
                name: getattr(self, name)
                for name in self.model_fields_set - {"prompt", "input_ids", "model", "return_logprob", "max_tokens"}
            },
        )


class GenerateFormat:
    """One choice: its text and ids, `meta_info` with the reason and the counts."""

    content_type = CONTENT_TYPE
    done = DONE

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._usage: Callable[[], Usage] = lambda: Usage(0, 0, 0)

    def follow(self, usage: Callable[[], Usage]) -> None:
        """Events tell what `usage` says when they are made."""
        self._usage = usage

    def opening(self, index: int) -> str:
        """Nothing."""
        return ""

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """What is new."""
        return event(dumps(self._fields(text, tokens or (), None)))

    def finish(self, index: int, reason: str) -> str:
        """The reason."""
        return event(dumps(self._fields("", (), reason)))

    def usage(self, usage: Usage) -> str:
        """It is in every event."""
        return ""

    def error(self, body: bytes) -> str:
        """The error as an event."""
        return error_event(body)

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        (choice,) = choices
        return dumps(self._fields(choice.text, choice.tokens or (), choice.finish)).encode("ascii")

    def _fields(self, text: str, tokens: Sequence[ShownToken], reason: str | None) -> dict[str, Any]:
        usage = self._usage()
        meta: dict[str, Any] = {
            "finish_reason": None if reason is None else {"type": reason},
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }
        if self._logprobs:
            meta["output_token_logprobs"] = [[finite(t.logprobs.logprob), t.logprobs.token_id] for t in tokens]
        return {"text": text, "output_ids": [t.logprobs.token_id for t in tokens], "meta_info": meta}
