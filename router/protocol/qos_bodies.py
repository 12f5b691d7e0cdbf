"""Bodies of /v1/chat/completions_qos and /v1/completions_qos, as LMDeploy-QoS documents them.

They are the plain routes' bodies with `user_id`, and take what its documents show: `messages` as one string, `stop:
false`, `session_id` and `suffix`, the last two without effect.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from router.protocol.openai import ChatBody, CompletionBody
from router.protocol.strict import Harmless
from router.protocol.validation import Refused

RESERVED = "default"  # in a configuration: users without a line


def _user_id(value: str) -> str:
    if value == RESERVED:
        raise Refused("Invalid '{param}': 'default' stands for users without a line; nobody is called so.")
    if not value.isprintable():
        raise Refused("Invalid '{param}': control characters are not allowed.")
    return value


def is_integer(value: Any) -> bool:
    """Not given, or an integer."""
    return value is None or type(value) is int


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


UserId = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_user_id)]
_MEANINGLESS: dict[str, Harmless] = {"session_id": is_integer}


def without_false_stop(data: Any) -> Any:
    """`data` less a `stop` that is false, as LMDeploy documents it."""
    if isinstance(data, dict) and data.get("stop") is False:
        return {k: v for k, v in data.items() if k != "stop"}
    return data


class QosChatBody(ChatBody):
    """POST /v1/chat/completions_qos."""

    not_done: ClassVar[dict[str, Harmless]] = {**ChatBody.not_done, **_MEANINGLESS}

    user_id: UserId | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_documented(cls, data: Any) -> Any:
        data = without_false_stop(data)
        if isinstance(data, dict) and isinstance(data.get("messages"), str):
            return {**data, "messages": [{"role": "user", "content": data["messages"]}]}
        return data


class QosCompletionBody(CompletionBody):
    """POST /v1/completions_qos."""

    not_done: ClassVar[dict[str, Harmless]] = {**CompletionBody.not_done, **_MEANINGLESS, "suffix": _text}

    user_id: UserId | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_documented(cls, data: Any) -> Any:
        return without_false_stop(data)
