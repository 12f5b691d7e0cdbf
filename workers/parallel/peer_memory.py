"""Sums through memory of each GPU that the other ranks of its group write, where they can (`kernels.all_reduce`).

That needs ranks on one host that all see all GPUs of the group, and GPUs that reach each other's memory. torch's
symmetric memory exchanges the addresses; its own collectives are not used.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from kernels.all_reduce import Inboxes, Layout, all_reduce, all_reduce_add_rms_norm
from workers.parallel.channel import host_id
from workers.parallel.group import Group

# Bytes that a rank sends at most for one sum. Every rank sends all it has to each other one, where the process group's
# way sends less than twice that in all: with many ranks it wins from some size on.
MOST_SENT = {2: 256 << 20}
MOST_SENT_TO_SEVERAL = 16 << 20
MOST_CHANNELS = 16384  # of a row, which one program holds
MOST_WIDTHS = 8  # widths of rows that get inboxes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

log = logging.getLogger("echelon.parallel")


class PeerMemory:
    """An `Exchange` through inboxes, which are made for each width of rows when the first such sum comes.

    All ranks make the same sums in the same order, so they all come to that together. Never while a graph is captured.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        assert group.handle is not None, "a group of several ranks has one"
        self._handle, self._rank, self._size, self._device = group.handle, group.rank, group.size, device
        self._most_sent = MOST_SENT.get(group.size, MOST_SENT_TO_SEVERAL)
        self._timeout: float | None = None
        self._inboxes: dict[tuple[int, torch.dtype], Inboxes] = {}
        self._kept: list[object] = []  # the memory lives as long as these

    def takes(self, x: torch.Tensor) -> bool:
        """See `Exchange`."""
        width = (x.shape[-1], x.dtype)
        if not (x.is_contiguous() and x.numel() and x.dtype in _DTYPES and width[0] <= MOST_CHANNELS):
            return False
        if x.numel() * x.element_size() * (self._size - 1) > self._most_sent:
            return False
        if width not in self._inboxes:
            if len(self._inboxes) == MOST_WIDTHS or torch.cuda.is_current_stream_capturing():
                return False
            self.prepare(*width)
        return True

    def all_reduce(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        all_reduce(x.view(-1, x.shape[-1]), self._inboxes[x.shape[-1], x.dtype])

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Exchange`."""
        return all_reduce_add_rms_norm(x, residual, weight, eps, self._inboxes[x.shape[-1], x.dtype])

    def set_timeout(self, seconds: float) -> None:
        """See `Exchange`."""
        self._timeout = seconds
        for inboxes in self._inboxes.values():
            inboxes.wait_at_most(seconds)

    def prepare(self, channels: int, dtype: torch.dtype) -> None:
        """Make the inboxes for rows of this width; all ranks at once. Raises RuntimeError where it cannot be done."""
        layout = Layout(self._size, channels, dtype.itemsize)
        inbox = symmetric_memory.empty(layout.total, dtype=torch.uint8, device=self._device).zero_()
        torch.cuda.synchronize(self._device)  # zeros are there before the others know of it
        peers = symmetric_memory.rendezvous(inbox, self._handle)
        addresses = [peers.get_buffer(r, (layout.total,), torch.uint8).data_ptr() for r in range(self._size)]
        inboxes = self._inboxes[channels, dtype] = Inboxes.at(addresses, self._rank, layout, self._device)
        if self._timeout is not None:
            inboxes.wait_at_most(self._timeout)
        self._kept.append((inbox, peers))


def share_memory(group: Group, device: torch.device, host: str = "") -> Group:
    """`group` with sums through its ranks' memory where that is possible; the log says which way, and why.

    `host` is what tells this rank's host apart, where more is known than a kernel says of itself: hosts that are
    containers of one machine may share that, its name and /dev/shm, but each counts its GPUs from 0.
    """
    if group.size == 1 or not isinstance(group.handle, dist.ProcessGroup):
        return group
    way = dist.get_backend(group.handle)
    why = "they are on CPUs" if device.type != "cuda" else _obstacle(group, device, host)
    if why is None:
        memory = PeerMemory(group, device)
        why = _trial(memory, group, device)
        if why is None:
            log.info("rank %d: the %d ranks of %s sum through each other's memory", group.rank, group.size, group.name)
            return replace(group, exchange=memory)
    log.info("rank %d: the %d ranks of %s sum through %s: %s", group.rank, group.size, group.name, way, why)
    return group


def _obstacle(group: Group, device: torch.device, host: str) -> str | None:
    """Why the ranks' GPUs cannot write each other, as all ranks see it."""
    place = int.from_bytes(hashlib.blake2b(f"{host_id()} {host}".encode(), digest_size=7).digest(), "little")
    index = torch.cuda.current_device() if device.index is None else device.index
    said = group.agree([place, index], device)
    hosts, indices = [one[0] for one in said], [one[1] for one in said]
    if len(set(hosts)) > 1:
        return "they are on several hosts"
    if len(set(indices)) < group.size:
        return "each sees its own GPU only"
    seen = torch.cuda.device_count()
    reach = [i < seen and (i == index or torch.cuda.can_device_access_peer(index, i)) for i in indices]
    if not all(one[0] for one in group.agree([int(all(reach))], device)):
        return "their GPUs do not reach each other's memory"
    return None


def _trial(memory: PeerMemory, group: Group, device: torch.device) -> str | None:
    """Why inboxes cannot be made, as all ranks see it."""
    error = None
    try:
        memory.prepare(8, torch.float32)
    except RuntimeError as e:
        error = e
        log.warning("rank %d: no memory for the others to write: %s", group.rank, e)
    if any(one[0] for one in group.agree([int(error is not None)], device)):
        return "torch's symmetric memory failed"
    return None
