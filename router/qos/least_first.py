"""Keys by a number each, from which the least are taken without a look at the others."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class LeastFirst(Generic[Key]):
    """A heap; equals come in the order in which they were put. An entry whose key has another number by now, or none,
    is dead and skipped: all is O(log n) amortized.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._live: dict[Key, tuple[float, int, Key]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def put(self, key: Key, number: float) -> None:
        """`key` has this number, and no other."""
        self._count += 1
        entry = self._live[key] = (number, self._count, key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def drop(self, key: Key) -> None:
        """`key` has no number, if it had one."""
        self._live.pop(key, None)

    def first(self) -> Key | None:
        """The one with the least number; None if there is none."""
        while self._heap:
            if self._live.get(self._heap[0][2]) is self._heap[0]:
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    def take(self, most: float) -> list[Key]:
        """Those with at most `most`, the least first; they have no number any more."""
        taken: list[Key] = []
        while (key := self.first()) is not None and self._heap[0][0] <= most:
            self.drop(key)
            taken.append(key)
        return taken
