"""Sequences that wait for a slot, and the seam by which a policy from outside orders them.

The engine knows no users and no tiers. An `Ordering` sorts requests into flows (say, one a user), ranks the flows, is
told what was executed, and names whom preemption hurts least.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol

from workers.api.request import EngineRequest
from workers.engine.sequence import Phase, Sequence

Rank = tuple[float, ...]  # compared as tuples; the least comes first


class Charge(NamedTuple):
    """What one step executed for one request, in tokens. Each position is charged once; the rest is overhead."""

    request: EngineRequest
    prefill: int
    decode: int
    kv_read: int  # cached tokens that its decodes read
    overhead: int  # recomputed


class Ordering(Protocol):
    """Who comes first. Handed in from outside; called by the thread that steps the engine."""

    def flow(self, request: EngineRequest) -> Hashable:
        """Requests of one flow are served among themselves by arrival, so preempted ones first. Never changes."""

    def rank(self, request: EngineRequest) -> Rank:
        """The rank of the flow at whose head `request` stands; the least is served first, then the earlier arrival.

        It may grow while the flow waits (service makes it grow), never shrink: the queue looks again only at the head.
        """

    def victim(self, request: EngineRequest) -> Rank:
        """The greatest is preempted first; among equals the youngest."""

    def executed(self, charges: list[Charge]) -> None:
        """A step is committed; this is what it executed for requests that had not ended."""


class Fifo:
    """By arrival; the youngest is preempted first."""

    def flow(self, request: EngineRequest) -> Hashable:
        """All in one."""
        return None

    def rank(self, request: EngineRequest) -> Rank:
        """All alike."""
        return ()

    def victim(self, request: EngineRequest) -> Rank:
        """All alike."""
        return ()

    def executed(self, charges: list[Charge]) -> None:
        """Charges change nothing."""


_Waiting = tuple[int, Sequence]  # (arrival, sequence): the preempted came before all that are still fresh


class _Flow:
    """The waiting sequences of one flow, a heap."""

    __slots__ = ("dead", "name", "serial", "waiting")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.waiting: list[_Waiting] = []
        self.serial = -1  # of its one valid entry among the flows
        self.dead = 0  # finished while they waited


class WaitingQueue:
    """Two heaps: flows by rank, and in each flow its sequences. O(log n) an operation, however ranks move."""

    def __init__(self, ordering: Ordering) -> None:
        self._ordering = ordering
        self._flows: dict[Hashable, _Flow] = {}
        self._order: list[tuple[Rank, int, int, _Flow]] = []  # rank, arrival of the head, serial, flow
        self._serial = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no order."""
        for flow in self._flows.values():
            yield from (s for _, s in flow.waiting if s.phase is Phase.WAITING)

    def push(self, sequence: Sequence) -> None:
        """It waits, in its flow by arrival; so one that was preempted is at the head again."""
        name = self._ordering.flow(sequence.request)
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = _Flow(name)
        entry = (sequence.arrival, sequence)
        heapq.heappush(flow.waiting, entry)
        self._size += 1
        if flow.waiting[0] is entry:
            self._enter(flow)

    def peek(self) -> Sequence | None:
        """The sequence to serve next, or None."""
        while self._order:
            rank, arrival, serial, flow = self._order[0]
            if serial != flow.serial:
                heapq.heappop(self._order)
                continue
            head = self._head(flow)
            if head is None:
                heapq.heappop(self._order)
                del self._flows[flow.name]
                continue
            if (self._ordering.rank(head[1].request), head[0]) == (rank, arrival):
                return head[1]
            heapq.heappop(self._order)
            self._enter(flow)
        return None

    def pop(self) -> Sequence:
        """Take out what `peek` shows. Raises IndexError if nothing waits."""
        sequence = self.peek()
        if sequence is None:
            raise IndexError("nothing waits")
        flow = self._order[0][3]
        heapq.heappop(flow.waiting)
        self._size -= 1
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence was finished (its phase says so already); it is never shown again."""
        self._size -= 1
        flow = self._flows[self._ordering.flow(sequence.request)]
        flow.dead += 1
        if flow.dead * 2 > len(flow.waiting):  # so that a stuck queue does not hold on to the dead
            flow.waiting = [w for w in flow.waiting if w[1].phase is Phase.WAITING]
            heapq.heapify(flow.waiting)
            flow.dead = 0

    def _head(self, flow: _Flow) -> _Waiting | None:
        while flow.waiting:
            if flow.waiting[0][1].phase is Phase.WAITING:
                return flow.waiting[0]
            heapq.heappop(flow.waiting)
            flow.dead -= 1
        return None

    def _enter(self, flow: _Flow) -> None:
        head = self._head(flow)
        if head is None:
            return
        self._serial += 1
        flow.serial = self._serial
        heapq.heappush(self._order, (self._ordering.rank(head[1].request), head[0], self._serial, flow))
