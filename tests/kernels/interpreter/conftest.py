"""Kernels against references: on a CUDA device as they are, on the CPU in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.backend import use_triton

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if use_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        return
    reason = "needs Triton and a CUDA device, or TRITON_INTERPRET=1 set for the whole process"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
