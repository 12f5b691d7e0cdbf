"""Sums over ranks by the kernel, in Triton's interpreter: each rank a process, the inboxes files that all map."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from summing_rank import EPS, main, parts_of

from kernels.all_reduce import ROWS, Layout, all_reduce_reference
from kernels.norms import add_rms_norm_reference

TURNS = (1, 3, 1, 2)  # rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs memory that processes share: see tests/gpu on a GPU")
@pytest.mark.parametrize(("size", "channels", "dtype"), [(2, 12, torch.float32), (3, 40, torch.float16)], ids=str)
def test_ranks_sum(size: int, channels: int, dtype: torch.dtype, tmp_path: Path) -> None:
    layout = Layout(size, channels, dtype.itemsize)
    for rank in range(size):
        (tmp_path / f"inbox{rank}").write_bytes(bytes(layout.total))
    fork = multiprocessing.get_context("fork")  # in no time: the ranks have one thread each, and no tensor of ours
    ready = fork.Barrier(size)
    arguments = (size, str(tmp_path), channels, dtype, TURNS, ready)
    ranks = [fork.Process(target=main, args=(rank, *arguments)) for rank in range(size)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(timeout=120)
        one.kill()
    assert [one.exitcode for one in ranks] == [0] * size
    found = [torch.load(tmp_path / f"results{rank}") for rank in range(size)]
    weight = torch.linspace(0.5, 1.5, channels).to(dtype)
    for turn, rows in enumerate(TURNS):
        *parts, residual = parts_of(size, rows, channels, dtype, turn)
        exact = all_reduce_reference(parts)
        normed, total = add_rms_norm_reference(exact, residual, weight, EPS)
        for results in found:
            assert torch.equal(results[turn][0], exact)
            assert torch.equal(results[turn][2], total)
            torch.testing.assert_close(results[turn][1], normed)
            assert torch.equal(results[turn][1], found[0][turn][1]), "the ranks' bits differ"


def test_an_inbox_has_room_for_all_and_overlaps_nowhere() -> None:
    layout = Layout(2, 4096, 2)
    assert layout.flags_at >= 2 * 2 * ROWS * 4096 * 2
    assert layout.total == layout.flags_at + 2 * 2 * ROWS * 4
    assert not Layout(3, 6, 4).flags_at % 16
