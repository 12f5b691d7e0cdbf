"""Who waits: by flow, in each by arrival."""

from __future__ import annotations

import pytest
from engine_runs import request
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.queue import WaitingQueue
from workers.engine.sequence import Phase, Sequence


def sequence(queue: WaitingQueue, arrival: int, owner: str = "") -> Sequence:
    return Sequence(request(f"{owner}{arrival}", [1], owner=owner), arrival, 100, queue.flow(owner))


def drain(queue: WaitingQueue, owner: str = "") -> list[str]:
    return [queue.pop(queue.flow(owner)).id for _ in range(len(queue))]


def test_by_arrival_so_that_the_preempted_are_in_front() -> None:
    queue = WaitingQueue()
    for arrival in (3, 4, 5, 2, 1):
        queue.push(sequence(queue, arrival))
    assert drain(queue) == ["1", "2", "3", "4", "5"]
    assert queue.flow("").head() is None
    with pytest.raises(IndexError):
        queue.pop(queue.flow(""))


def test_the_finished_are_never_shown_and_not_kept() -> None:
    queue = WaitingQueue()
    waiting = [sequence(queue, arrival) for arrival in range(100)]
    for one in waiting:
        queue.push(one)
    for one in waiting[:99]:
        one.phase = Phase.FINISHED
        queue.discard(one)
    assert len(queue) == 1
    assert len(queue.flow("").waiting) <= 2
    assert drain(queue) == ["99"]


def test_a_flow_goes_with_its_last_sequence() -> None:
    queue = WaitingQueue()
    waits, runs = sequence(queue, 0, "a"), sequence(queue, 1, "b")
    queue.push(waits)
    runs.flow.residents[runs] = None
    for flow in (waits.flow, runs.flow):
        queue.forget(flow)
    assert {flow.handle for flow in queue.flows} == {"a", "b"}
    waits.phase = Phase.FINISHED
    queue.discard(waits)
    del runs.flow.residents[runs]
    for flow in (waits.flow, runs.flow):
        queue.forget(flow)
    assert list(queue.flows) == []


steps = st.lists(st.tuples(st.sampled_from(["push", "again", "pop", "discard"]), st.integers(0, 10**6)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps)
def test_random_operations_equal_sorting_everything(steps: list[tuple[str, int]]) -> None:
    queue = WaitingQueue()
    waiting: list[Sequence] = []
    taken: list[Sequence] = []
    arrivals = 0
    for what, number in steps:
        owner = "abc"[number % 3]
        if what == "push":
            waiting.append(sequence(queue, arrivals, owner))
            arrivals += 1
            queue.push(waiting[-1])
        elif what == "again" and taken:
            waiting.append(taken.pop(number % len(taken)))
            queue.push(waiting[-1])
        elif what == "pop" and any(s.request.owner == owner for s in waiting):
            one = queue.pop(queue.flow(owner))
            assert one.arrival == min(s.arrival for s in waiting if s.request.owner == owner)
            waiting.remove(one)
            taken.append(one)
        elif what == "discard" and waiting:
            one = waiting.pop(number % len(waiting))
            one.phase = Phase.FINISHED
            queue.discard(one)
        assert len(queue) == len(waiting)
        assert {s.id for s in queue} == {s.id for s in waiting}
        for owner in "abc":
            head = queue.flow(owner).head()
            mine = [s for s in waiting if s.request.owner == owner]
            assert head is (min(mine, key=lambda s: s.arrival) if mine else None)
