"""Host memory that blocks of the KV cache are copied to and from, on one rank: what `StepPlan`'s copies say.

Shapes: N blocks on the device, H blocks on the host, C bytes of a block over all layers. On the host a block is one
piece, so that a copy between host and device is one transfer; on the device it is gathered from, and scattered to, its
places in the layers. On CUDA everything is queued on the step's stream and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.api.errors import OutOfMemory
from workers.context import LayerCache
from workers.execution.halving import is_out_of_memory
from workers.execution.memory import readable
from workers.execution.pinned import HostBuffers

STAGING_BYTES = 64 << 20  # of device memory that the copies of one step take at most

Copies = Sequence[tuple[int, int]]


class HostCache:
    """`num_blocks` blocks like those of `caches`; on CUDA in page-locked memory. Raises OutOfMemory."""

    def __init__(self, caches: Sequence[LayerCache], num_blocks: int) -> None:
        tensors = [t for cache in caches for t in (cache.key, cache.value)]
        self.device = tensors[0].device
        self._rows = [t.view(len(t), -1).view(torch.uint8) for t in tensors]  # each [N, C of this tensor]
        size = sum(rows.shape[1] for rows in self._rows)
        try:
            pinned = self.device.type == "cuda"
            self._host = torch.empty((num_blocks, size), dtype=torch.uint8, pin_memory=pinned)  # [H, C]
        except RuntimeError as e:
            raise OutOfMemory(
                f"{num_blocks} blocks of host memory take {readable(num_blocks * size)}, which cannot be allocated: "
                f"lower swap_space or num_cpu_blocks ({e})"
            ) from e
        self._most = max(1, STAGING_BYTES // size)

    @property
    def num_blocks(self) -> int:
        """H."""
        return len(self._host)

    def copy(self, out: Copies, into: Copies, buffers: HostBuffers) -> None:
        """First (device block, host block) pairs `out`, then (host block, device block) pairs `into`."""
        for pairs, copy in ((out, self._copy_out), (into, self._copy_in)):
            at, most = 0, self._most
            while at < len(pairs):
                sources, targets = zip(*pairs[at : at + most], strict=True)
                try:
                    copy(sources, targets, buffers)
                except Exception as e:
                    if len(sources) == 1 or not is_out_of_memory(e):
                        raise
                    most = len(sources) // 2  # the same ones again, fewer at a time
                else:
                    at += most

    def _copy_out(self, blocks: Sequence[int], targets: Sequence[int], buffers: HostBuffers) -> None:
        index, staging = self._index(blocks, buffers), self._staging(len(blocks))
        at = 0
        for rows in self._rows:
            width = rows.shape[1]
            staging[:, at : at + width] = rows.index_select(0, index)
            at += width
        for number, target in enumerate(targets):
            self._host[target].copy_(staging[number], non_blocking=True)

    def _copy_in(self, sources: Sequence[int], blocks: Sequence[int], buffers: HostBuffers) -> None:
        index, staging = self._index(blocks, buffers), self._staging(len(blocks))
        for number, source in enumerate(sources):
            staging[number].copy_(self._host[source], non_blocking=True)
        at = 0
        for rows in self._rows:
            width = rows.shape[1]
            rows.index_copy_(0, index, staging[:, at : at + width])
            at += width

    def _index(self, blocks: Sequence[int], buffers: HostBuffers) -> torch.Tensor:
        lent = buffers.lend(len(blocks), torch.int64)
        lent.copy_(torch.tensor(blocks))
        return lent.to(self.device, non_blocking=True)

    def _staging(self, count: int) -> torch.Tensor:
        return torch.empty((count, self._host.shape[1]), dtype=torch.uint8, device=self.device)
