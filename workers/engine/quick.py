"""Frozen dataclasses at the price of plain ones.

The constructor of a frozen slotted dataclass goes through `object.__setattr__` field by field: 2 to 4 us for what the
engine makes twice per sequence and step, which is more than all else it does. A mutable twin with the same slots is
filled at plain speed and then becomes the frozen class.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

T = TypeVar("T")


def quick(frozen: type[T]) -> type[T]:
    """A constructor of `frozen`, a frozen slotted dataclass: same arguments, same instances, a fifth of the time.

    For the inner loops only. Raises TypeError at the first call if the class has other slots than its fields.
    """

    def freeze(self: Any) -> None:
        self.__class__ = frozen

    fields: list[Any] = []
    for item in dataclasses.fields(cast(Any, frozen)):
        plain = dataclasses.field(default=item.default, default_factory=item.default_factory)
        fields.append((item.name, Any, plain))
    return cast(
        "type[T]", dataclasses.make_dataclass(frozen.__name__, fields, slots=True, namespace={"__post_init__": freeze})
    )
