"""Host arrays to the device: one copy a step, whatever the number of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from workers.execution.pinned import HostBuffers

Array = np.ndarray  # of any shape and dtype
_ALIGN = 16  # bytes: any dtype may begin there, and kernels may load vectors

_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class Uploader:
    """Copies arrays to `device`. On the CPU the tensors share the arrays' memory.

    On CUDA the copy goes through pinned memory without waiting. The device buffer is one and the same for all steps, so
    arrays of the same sizes come to lie at the same addresses, which CUDA graphs need.
    """

    def __init__(self, device: torch.device, host: HostBuffers, capacity: int = 1 << 20) -> None:
        self._device, self._host = device, host
        self._buffer = torch.empty(capacity if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def upload(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """The arrays as tensors on the device, valid until the next call's work begins there."""
        if self._device.type == "cpu":
            return [torch.from_numpy(a) for a in arrays]
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        if end > self._buffer.numel():
            self._buffer = torch.empty(2 * end, dtype=torch.uint8, device=self._device)
        staging = self._host.lend(end)
        host = staging.numpy()
        for array, start in zip(arrays, starts, strict=True):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._buffer[:end].copy_(staging, non_blocking=True)
        return [
            self._buffer[start : start + array.nbytes].view(_TORCH[array.dtype]).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]
