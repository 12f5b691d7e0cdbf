"""The waiting room against a sorted list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.qos.queue import Fifo, Key, WaitingQueue


@dataclass
class Item:
    name: str
    arrived: float
    rank: int = 0


class ByRank:
    def key(self, item: Item) -> Key:
        return (item.rank, 0.0, item.arrived)


@given(st.lists(st.tuples(st.sampled_from("pxr"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 30))))
def test_behaves_as_a_stable_sort(operations: list[tuple[str, int, int, int]]) -> None:
    queue: WaitingQueue[Item] = WaitingQueue(ByRank(), 1000)
    model: list[Item] = []
    for number, (what, rank, arrived, index) in enumerate(operations):
        if what == "p":
            item = Item(f"i{number}", float(arrived), rank)
            queue.push(item.name, item)
            model.append(item)
            model.sort(key=lambda i: (i.rank, i.arrived))
        elif what == "x" and model:
            first = model.pop(0)
            assert queue.remove(first.name) is first
        elif what == "r" and model:
            gone = model.pop(index % len(model))
            assert queue.remove(gone.name) is gone
            assert queue.remove(gone.name) is None
            assert gone.name not in queue
        assert len(queue) == len(model)
        assert queue.peek() is (model[0] if model else None)
        assert {i.name for i in queue} == {i.name for i in model}


def test_dead_entries_do_not_pile_up() -> None:
    queue: WaitingQueue[Item] = WaitingQueue(Fifo(), 10)
    queue.push("first", Item("first", 0.0))
    for i in range(10_000):
        queue.push(f"{i}", Item(f"{i}", 1.0 + i))
        queue.remove(f"{i}")
    assert len(queue._heap) < 200
    assert queue.peek() == Item("first", 0.0)


def test_an_id_that_comes_back_is_a_new_entry() -> None:
    queue: WaitingQueue[Item] = WaitingQueue(Fifo(), 10)
    queue.push("a", Item("a", 1.0))
    queue.push("b", Item("b", 2.0))
    queue.remove("a")
    queue.push("a", Item("a", 3.0))
    assert queue.peek() == Item("b", 2.0)
    with pytest.raises(ValueError, match="waits already"):
        queue.push("a", Item("a", 4.0))


def test_full_says_so_and_does_not_enforce() -> None:
    queue: WaitingQueue[Item] = WaitingQueue(Fifo(), 1)
    assert not queue.full
    queue.push("a", Item("a", 1.0))
    assert queue.full
    queue.push("b", Item("b", 1.0))
    assert len(queue) == 2
