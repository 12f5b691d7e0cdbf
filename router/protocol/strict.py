"""The base of request bodies: no type is guessed, no unknown field passes, what is not done is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from router.protocol.validation import Refused

Harmless = Callable[[Any], bool]


def is_nothing(value: Any) -> bool:
    """Asks for nothing."""
    return value is None or value in ([], {}, "")


def is_false(value: Any) -> bool:
    """Not given, or false."""
    return value is None or value is False


class Strict(BaseModel):
    """No type is guessed, no unknown field passes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    not_done: ClassVar[dict[str, Harmless]] = {}  # documented, refused unless the value asks for nothing
    why: ClassVar[dict[str, str]] = {}  # of some of them: what there is instead

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            # Here and not by pydantic, which would list every one of 400,000 unknown keys.
            if name not in _names(cls) and name not in cls.not_done:
                raise Refused("Unknown parameter: '{param}'.", code="unknown_parameter", at=(name,))
            if name in cls.not_done and not cls.not_done[name](data[name]):
                why = f": {cls.why[name]}" if name in cls.why else ""
                raise Refused(
                    f"Unsupported parameter: '{{param}}' is not supported by this server with this value{why}.",
                    code="unsupported_parameter",
                    at=(name,),
                )
        return {k: v for k, v in data.items() if k not in cls.not_done}


@cache
def _names(cls: type[BaseModel]) -> frozenset[str]:
    """Its fields, as bodies call them."""
    return frozenset(str(field.validation_alias or name) for name, field in cls.model_fields.items())
