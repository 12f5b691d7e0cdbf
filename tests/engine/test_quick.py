"""`quick` makes the very instances that the frozen class makes."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from workers.api.request import Delta
from workers.engine.plan import ScheduledSequence
from workers.engine.quick import quick


@pytest.mark.parametrize(
    ("frozen", "fields"),
    [
        (ScheduledSequence, (1, 2, 3, 1)),
        (ScheduledSequence, (1, 2, 3, 1, (4, 5))),
        (Delta, ("r", 7, (3,))),
    ],
)
def test_an_instance_is_the_frozen_class_in_all_but_its_price(frozen: type, fields: tuple[object, ...]) -> None:
    made, plain = quick(frozen)(*fields), frozen(*fields)
    assert type(made) is frozen
    assert made == plain
    assert hash(made) == hash(plain)
    assert repr(made) == repr(plain)
    assert pickle.loads(pickle.dumps(made)) == plain
    name = dataclasses.fields(frozen)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 0)


def test_keywords_and_missing_fields_are_as_usual() -> None:
    assert quick(Delta)(request_id="r", position=0, error="e") == Delta("r", 0, error="e")
    with pytest.raises(TypeError, match="position"):
        quick(Delta)("r")  # type: ignore[call-arg]


def test_a_class_with_other_slots_is_refused_at_the_first_call() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loose:
        field: int

    with pytest.raises(TypeError):
        quick(Loose)(1)
