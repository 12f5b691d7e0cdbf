"""Host memory that the device copies from and to, lent to a step and used again by later ones."""

from __future__ import annotations

from collections import defaultdict

import torch

_LEAST = 4096  # bytes


class HostBuffers:
    """Buffers by size, a power of two; a step that finds none free gets a new one, so after a few steps all are there.

    `pinned`: page-locked, so that copies wait for nobody (needs CUDA). The caller gives a step's buffers back once the
    device is done with them; those of a step that failed are left to torch, which knows when that is.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._lent: list[torch.Tensor] = []

    def lend(self, count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """A tensor [count], not initialized."""
        needed = count * dtype.itemsize
        size = max(_LEAST, 1 << max(0, needed - 1).bit_length())
        free = self._free[size]
        buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        self._lent.append(buffer)
        return buffer[:needed].view(dtype)

    def take(self) -> list[torch.Tensor]:
        """What was lent since the last call: a step's, to be given back with it."""
        lent, self._lent = self._lent, []
        return lent

    def give_back(self, lent: list[torch.Tensor]) -> None:
        """The device has read and written these; each may be given back once."""
        for buffer in lent:
            self._free[buffer.numel()].append(buffer)
