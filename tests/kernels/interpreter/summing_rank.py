"""What each of several processes runs in test_all_reduce_kernel.py."""

from __future__ import annotations

import mmap
import time
from multiprocessing.synchronize import Barrier

import torch

from kernels.all_reduce import Inboxes, Layout, all_reduce, all_reduce_add_rms_norm

EPS = 1e-5


def parts_of(size: int, rows: int, channels: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What the ranks bring, and behind it a residual."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, channels, generator=random).to(dtype) for _ in range(size + 1)]


def main(
    rank: int, size: int, folder: str, channels: int, dtype: torch.dtype, rows: tuple[int, ...], ready: Barrier
) -> None:
    """Every sum of `rows` rows, alone and with addition and norm; the results go to `folder`."""
    torch.set_num_threads(1)
    layout = Layout(size, channels, dtype.itemsize)
    maps = []
    for one in range(size):  # each inbox is a file that all map
        with open(f"{folder}/inbox{one}", "r+b") as file:
            maps.append(mmap.mmap(file.fileno(), layout.total))
    boxes = [torch.frombuffer(one, dtype=torch.uint8) for one in maps]
    inboxes = Inboxes.at([box.data_ptr() for box in boxes], rank, layout, torch.device("cpu"))
    weight = torch.linspace(0.5, 1.5, channels).to(dtype)
    results = []
    ready.wait()
    for turn, count in enumerate(rows):
        *parts, residual = parts_of(size, count, channels, dtype, turn)
        if turn % 2 == rank:
            time.sleep(0.02)  # each is the late one in turn
        x = parts[rank].clone()
        normed, total = all_reduce_add_rms_norm(x, residual, weight, EPS, inboxes)
        all_reduce(x, inboxes)
        results.append((x, normed, total))
    torch.save(results, f"{folder}/results{rank}")
    ready.wait()
