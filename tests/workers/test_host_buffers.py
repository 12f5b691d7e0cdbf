"""Host buffers: what is lent is nobody else's until it is given back, and is used again then."""

from __future__ import annotations

import random

import torch

from workers.execution.pinned import HostBuffers


def test_no_two_steps_share_memory_and_none_is_allocated_once_all_are_there() -> None:
    buffers, rng = HostBuffers(pinned=False), random.Random(3)
    under_way: list[list[torch.Tensor]] = []
    seen: set[int] = set()
    late = 0
    for step in range(400):
        tensors = [buffers.lend(count, torch.int64) for count in (rng.randrange(520, 1000), 17, 5000)]
        lent = buffers.take()
        assert [t.numel() for t in tensors[1:]] == [17, 5000]
        busy = {b.data_ptr() for other in under_way for b in other}
        assert busy.isdisjoint(b.data_ptr() for b in lent)
        fresh = {b.data_ptr() for b in lent} - seen
        seen |= fresh
        late += len(fresh) if step >= 3 else 0
        under_way.append(lent)
        if len(under_way) > 2:  # as many steps as are ever under way
            buffers.give_back(under_way.pop(0))
    assert late == 0
    assert buffers.take() == []


def test_sizes_and_dtypes() -> None:
    buffers = HostBuffers(pinned=False)
    for count, dtype in ((0, torch.uint8), (1, torch.float32), (4096, torch.uint8), (4097, torch.uint8)):
        tensor = buffers.lend(count, dtype)
        assert (tuple(tensor.shape), tensor.dtype) == ((count,), dtype)
    assert [b.numel() for b in buffers.take()] == [4096, 4096, 4096, 8192]
