"""Sequences that wait for a slot, by flow: all in one where they come first, first served, else as a policy says."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from workers.api.ordering import Flow as Handle
from workers.engine.sequence import Flow, Phase, Sequence


class WaitingQueue:
    """All flows with a live sequence, by handle. O(log n) an operation."""

    def __init__(self) -> None:
        self._flows: dict[Handle, Flow] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no order."""
        for flow in self._flows.values():
            yield from (s for _, s in flow.waiting if s.phase is Phase.WAITING)

    @property
    def flows(self) -> Iterator[Flow]:
        """All of them."""
        return iter(self._flows.values())

    def flow(self, handle: Handle) -> Flow:
        """The flow of this handle; a new one if it has none."""
        found = self._flows.get(handle)
        if found is None:
            found = self._flows[handle] = Flow(handle)
        return found

    def push(self, sequence: Sequence) -> None:
        """It waits, in its flow by arrival; so one that was preempted is at the head again."""
        heapq.heappush(sequence.flow.waiting, (sequence.arrival, sequence))
        self._size += 1

    def pop(self, flow: Flow) -> Sequence:
        """Take out the head of `flow`. Raises IndexError if nothing waits there."""
        head = flow.head()
        if head is None:
            raise IndexError("nothing waits")
        heapq.heappop(flow.waiting)
        self._size -= 1
        return head

    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence was finished (its phase says so already); it is never shown again."""
        self._size -= 1
        flow = sequence.flow
        flow.dead += 1
        if flow.dead * 2 > len(flow.waiting):  # so that a stuck queue does not hold on to the dead
            flow.waiting = [w for w in flow.waiting if w[1].phase is Phase.WAITING]
            heapq.heapify(flow.waiting)
            flow.dead = 0

    def forget(self, flow: Flow) -> None:
        """A flow without any sequence goes."""
        if not flow.residents and len(flow.waiting) == flow.dead:
            self._flows.pop(flow.handle, None)
