"""Blocks of host memory, for prefixes whose blocks on the device went to somebody else (`eviction_type: copy`).

A cached block that is given away is copied out first; a sequence whose prefix is found here gets blocks on the device,
into which it is copied back instead of being computed again. Both are part of a step's plan: every rank makes the
copies before the step, those that go out first. What a host block holds is known by the hash that its prefix has in
the prefix cache; the one that was used longest ago makes room. A block stays here when it is copied back, so that it
need not be copied out again.
"""

from __future__ import annotations

from collections import OrderedDict

Copies = tuple[tuple[int, int], ...]  # (from, to), block numbers


class HostBlocks:
    """Which host block holds which hash, and what the next plan copies. Without blocks nothing is held."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.copied_out = self.copied_in = 0  # blocks, since the start
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_of: OrderedDict[bytes, int] = OrderedDict()  # used longest ago first
        self._reading: set[bytes] = set()  # by the next plan: their blocks are not to be written by it
        self._leaving: list[int] = []  # blocks that the next plan still reads, and that are free then
        self._out: dict[int, int] = {}  # host block -> device block
        self._in: list[tuple[int, int]] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._block_of

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def digests(self) -> set[bytes]:
        """All that are here."""
        return set(self._block_of)

    def save(self, digest: bytes, block: int) -> list[bytes]:
        """Device block `block`, which holds `digest`, is copied out by the next plan, if it is not here already.

        Returns the hashes that made room for it. Nothing happens where the next plan reads all host blocks.
        """
        if digest in self._block_of:
            self._block_of.move_to_end(digest)
            return []
        gone: list[bytes] = []
        if not self._free:
            oldest = next((d for d in self._block_of if d not in self._reading), None)
            if oldest is None:
                return gone
            self.drop(oldest)
            gone.append(oldest)
        target = self._block_of[digest] = self._free.pop()
        self._out[target] = block
        return gone

    def hold(self, digest: bytes) -> None:
        """`digest`, which is here, stays until the next plan was taken."""
        self._reading.add(digest)

    def restore(self, digest: bytes, block: int) -> None:
        """The next plan copies `digest`, which is held, to device block `block`."""
        self._block_of.move_to_end(digest)
        self._in.append((self._block_of[digest], block))
        self.copied_in += 1

    def drop(self, digest: bytes) -> bool:
        """`digest` is here no more; whether it was."""
        block = self._block_of.pop(digest, None)
        if block is None:
            return False
        if digest in self._reading:
            self._leaving.append(block)
        else:
            self._out.pop(block, None)
            self._free.append(block)
        return True

    def take_copies(self) -> tuple[Copies, Copies]:
        """What goes out and what comes in before the plan that is being made, in this order."""
        if not (self._out or self._in):
            return (), ()
        copies = tuple((block, host) for host, block in self._out.items()), tuple(self._in)
        self._free += self._leaving
        self._leaving.clear()
        self.copied_out += len(self._out)
        self._out.clear()
        self._in.clear()
        self._reading.clear()
        return copies

    def check(self) -> None:
        """Raises AssertionError unless free + held == total, each block once."""
        blocks = sorted((*self._free, *self._leaving, *self._block_of.values()))
        assert blocks == list(range(self.num_blocks)), f"host blocks, free and held: {blocks}"
