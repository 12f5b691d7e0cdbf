"""A rank that does not come: who waits for it in a sum ends with an error, once its patience is over."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# A process of its own: its CUDA context is of no use afterwards.
ALONE = """
import os, sys, torch
from kernels.all_reduce import Inboxes, Layout, all_reduce

device, layout = torch.device("cuda", 0), Layout(2, 64, 4)
boxes = [torch.zeros(layout.total, dtype=torch.uint8, device=device) for _ in range(2)]
inboxes = Inboxes.at([box.data_ptr() for box in boxes], 0, layout, device)
inboxes.wait_at_most(0.5)
all_reduce(torch.ones(3, 64, device=device), inboxes)
try:
    torch.cuda.synchronize()
except RuntimeError:
    sys.stdout.write("the sum was given up")
    sys.stdout.flush()
os._exit(0)
"""


def test_a_sum_is_given_up_when_a_rank_does_not_come() -> None:
    ended = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "the sum was given up", ended.stderr
