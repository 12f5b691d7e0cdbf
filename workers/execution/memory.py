"""Device memory: what is free, what a step takes at its peak, and messages about both. Bytes throughout."""

from __future__ import annotations

from collections.abc import Callable

import torch


def free_bytes(device: torch.device) -> int:
    """What this process can still allocate on a CUDA device: free on the device, or cached by torch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """What `work` allocates at its peak beyond what is allocated now; gives torch's cached memory back after it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return int(peak)


def readable(count: int) -> str:
    """A number of bytes for people: 1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
