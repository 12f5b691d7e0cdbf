"""Who is served next: by rank of the flow, then by arrival, however ranks grow."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from engine_runs import request
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.api.request import EngineRequest
from workers.engine.queue import Charge, Fifo, Rank, WaitingQueue
from workers.engine.sequence import Phase, Sequence


class ByOwner:
    """One flow an owner; ranks are what the test says."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self.looks = 0

    def flow(self, request: EngineRequest) -> Hashable:
        return request.owner

    def rank(self, request: EngineRequest) -> Rank:
        self.looks += 1
        return (self.ranks.get(request.owner, 0),)

    def victim(self, request: EngineRequest) -> Rank:
        return ()

    def executed(self, charges: list[Charge]) -> None:
        raise NotImplementedError


def sequence(arrival: int, owner: str = "") -> Sequence:
    return Sequence(request(f"{owner}{arrival}", [1], owner=owner), arrival, 100)


def drain(queue: WaitingQueue) -> list[str]:
    return [queue.pop().id for _ in range(len(queue))]


def test_fifo_by_arrival_so_that_the_preempted_are_in_front() -> None:
    queue = WaitingQueue(Fifo())
    for arrival in (3, 4, 5):
        queue.push(sequence(arrival))
    queue.push(sequence(2))
    queue.push(sequence(1))
    assert drain(queue) == ["1", "2", "3", "4", "5"]
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_the_least_flow_first_and_a_grown_rank_is_seen() -> None:
    ordering = ByOwner()
    queue = WaitingQueue(ordering)
    for arrival, owner in enumerate("aabbc"):
        queue.push(sequence(arrival, owner))
    ordering.ranks.update(a=1, c=2)
    assert queue.pop().id == "b2"
    ordering.ranks["b"] = 5
    assert drain(queue) == ["a0", "a1", "c4", "b3"]


def test_the_finished_are_never_shown_and_not_kept() -> None:
    queue = WaitingQueue(Fifo())
    waiting = [sequence(arrival) for arrival in range(100)]
    for one in waiting:
        queue.push(one)
    for one in waiting[:99]:
        one.phase = Phase.FINISHED
        queue.discard(one)
    assert len(queue) == 1
    assert len(queue._flows[None].waiting) <= 2
    assert drain(queue) == ["99"]


def test_a_decision_looks_at_flows_whose_rank_grew_not_at_every_request() -> None:
    ordering = ByOwner()
    queue = WaitingQueue(ordering)
    for arrival in range(5000):
        queue.push(sequence(arrival, owner=str(arrival % 50)))
    queue.peek()
    ordering.looks = 0
    for turn in range(100):
        served = queue.pop()
        ordering.ranks[served.request.owner] = turn + 1
    assert ordering.looks <= 100 * 5


steps = st.lists(st.tuples(st.sampled_from(["push", "again", "pop", "discard", "charge"]), st.integers(0, 10**6)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps)
def test_random_operations_equal_sorting_everything(steps: list[tuple[str, int]]) -> None:
    ordering = ByOwner()
    queue = WaitingQueue(ordering)
    waiting: list[Sequence] = []
    taken: list[Sequence] = []
    arrivals = 0

    def first() -> Sequence:
        heads: dict[str, Sequence] = {}
        for one in sorted(waiting, key=lambda s: s.arrival):
            heads.setdefault(one.request.owner, one)
        return min(heads.values(), key=lambda s: (ordering.rank(s.request), s.arrival))

    for what, number in steps:
        if what == "push":
            one = sequence(arrivals, owner="abc"[number % 3])
            arrivals += 1
            waiting.append(one)
            queue.push(one)
        elif what == "again" and taken:
            one = taken.pop(number % len(taken))
            waiting.append(one)
            queue.push(one)
        elif what == "pop" and waiting:
            one = queue.pop()
            assert one is first()
            waiting.remove(one)
            taken.append(one)
        elif what == "discard" and waiting:
            one = waiting.pop(number % len(waiting))
            one.phase = Phase.FINISHED
            queue.discard(one)
        elif what == "charge":
            owner = "abc"[number % 3]
            ordering.ranks[owner] = ordering.ranks.get(owner, 0) + number % 4
        assert len(queue) == len(waiting)
        assert queue.peek() is (first() if waiting else None)
        assert {s.id for s in queue} == {s.id for s in waiting}
