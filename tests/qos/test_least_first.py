"""Keys by number, against a dictionary that is looked through.

Mutants seen to fail: a number that has shrunk, or grown, or that was dropped, found at its old place; dead entries
kept.
"""

from __future__ import annotations

import random

from router.qos.least_first import LeastFirst


def test_against_a_dictionary() -> None:
    rng = random.Random(0)
    table: LeastFirst[int] = LeastFirst()
    numbers: dict[int, float] = {}
    for _ in range(5000):
        key = rng.randrange(50)
        match rng.randrange(8):
            case 0:
                table.drop(key)
                numbers.pop(key, None)
            case 1:
                most = rng.uniform(0.0, 0.1)
                taken = sorted((n, k) for k, n in numbers.items() if n <= most)
                assert table.take(most) == [k for _, k in taken]
                for _, k in taken:
                    del numbers[k]
            case _:
                numbers[key] = rng.random()
                table.put(key, numbers[key])
        assert table.first() == min(numbers, key=numbers.__getitem__, default=None)
        assert len(table) == len(numbers)
        assert len(table._heap) <= 2 * 50 + 64


def test_equals_in_the_order_in_which_they_were_put() -> None:
    table: LeastFirst[str] = LeastFirst()
    for key in "cab":
        table.put(key, 1.0)
    table.put("c", 1.0)
    assert table.take(1.0) == ["a", "b", "c"]
