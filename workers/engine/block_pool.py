"""Blocks of KV cache: who may write where. A block is free, held (by one or more sequences), or idle.

An idle block is held by nobody and keeps its content, in case a later prompt starts alike; when the free list is empty,
the one that was idle longest is evicted (LRU). Paged KV cache: Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", SOSP'23.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Reference counts, the free list and the LRU of idle blocks. All operations are O(1) a block."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.on_evict: list[Callable[[int], None]] = []  # each is told of a kept block whose content is given up
        self.on_reuse: list[Callable[[int], None]] = []  # the same, before it, where the content is still good
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self.kept: set[int] = set()  # blocks whose content is worth keeping; read only

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody holds and whose content is kept."""
        return len(self._idle)

    def refs(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._refs[block]

    def take(self) -> int:
        """A block for one holder, content undefined. Evicts the longest idle one if none is free.

        Raises ValueError if there is none.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            for callback in self.on_reuse:
                callback(block)
            self._evict(block)
        else:
            raise ValueError(f"all {self.num_blocks} blocks are held")
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder for a block that is held or idle."""
        if self._refs[block] == 0:
            del self._idle[block]  # KeyError: it was free, its content is gone
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each. Give the last block of a sequence first: prefixes are worth more than tails."""
        for block in blocks:
            left = self._refs[block] - 1
            if left < 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._refs[block] = left
            if left == 0:
                if block in self.kept:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """From now on the block goes idle, not free, when its last holder leaves."""
        self.kept.add(block)

    def drop(self, block: int) -> None:
        """The content of a kept block is worth nothing any more; an idle one becomes free. Calls `on_evict`."""
        if block not in self.kept:
            return
        self._evict(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _evict(self, block: int) -> None:
        self.kept.discard(block)
        for callback in self.on_evict:
            callback(block)

    def check(self, holders: dict[int, int]) -> None:
        """Raises AssertionError unless free + held + idle == total and `holders` (block -> count) are the counts."""
        free, idle = set(self._free), set(self._idle)
        held = {b for b, n in enumerate(self._refs) if n}
        assert len(free) == len(self._free), f"a block is twice in the free list: {sorted(self._free)}"
        twice = (free & idle) | (free & held) | (idle & held)
        assert not twice, f"blocks {sorted(twice)} are in two of free, idle and held"
        total = len(free) + len(idle) + len(held)
        assert total == self.num_blocks, (
            f"free {len(free)} + idle {len(idle)} + held {len(held)} = {total}, not {self.num_blocks}"
        )
        assert idle <= self.kept, f"idle but not kept: {sorted(idle - self.kept)}"
        assert not free & self.kept, f"kept but free: {sorted(free & self.kept)}"
        counted = {b: n for b, n in enumerate(self._refs) if n}
        wrong = {b: (n, counted.get(b, 0)) for b, n in holders.items() if counted.get(b, 0) != n}
        assert not wrong, f"block -> (holders, references) differ: {wrong}"
        lost = held - holders.keys()
        assert not lost, f"blocks with references but no holder: {sorted(lost)}"
