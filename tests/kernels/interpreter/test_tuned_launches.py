"""Launches are cut as the device's table says."""

from __future__ import annotations

import pytest
import torch

from kernels import linear, paged_decode, paged_prefill
from kernels.tuning import make_table

DECODE = {"tile": 16, "warps": 2, "stages": 2, "tail": True}
TABLE = {
    "decode": [
        {
            **{"bits": 32, "head_size": 16, "group": 2},
            "steps": [
                {"below": 3, "tuning": {**DECODE, "programs": 4}},
                {"below": 9, "tuning": {**DECODE, "tile": 32, "least": 4, "programs": 64}},
                {"below": None, "tuning": {**DECODE, "programs": 0}},
            ],
        }
    ],
    "prefill": [
        {
            **{"bits": 32, "head_size": 16, "group": 2},
            "steps": [
                {"below": 9, "tuning": {"rows": 16, "tile": 16, "warps": 4, "stages": 2}},
                {"below": None, "tuning": {"rows": 64, "tile": 32, "warps": 8, "stages": 3}},
            ],
        }
    ],
    "gemv": [{"outputs": 5, "inputs": 24, "tuning": {"rows": 2, "warps": 4}}],
}


class Watched:
    """A kernel and the grids and arguments that it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append((grid, named, kwargs["num_warps"], kwargs.get("num_stages")))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def watch(monkeypatch):
    def start(module, kernel):
        monkeypatch.setattr(module, "table_of", lambda _device: make_table(TABLE))
        watched = Watched(getattr(module, kernel))
        monkeypatch.setattr(module, kernel, watched)
        return watched.launches

    return start


@pytest.mark.parametrize(
    ("batch", "splits", "tile", "least"), [(1, 2, 16, 1), (2, 2, 32, 4), (4, 2, 32, 4), (5, 1, 16, 1)]
)
def test_decode(make_case, watch, monkeypatch, batch, splits, tile, least):
    monkeypatch.setattr(paged_decode, "_multiprocessors", lambda _device: 1)
    launches = watch(paged_decode, "_decode_kernel")
    case = make_case([(1, 60 - i) for i in range(batch)], 4, 2, 16, 16)
    out = paged_decode.paged_decode(
        case.q, case.key_cache, case.value_cache, case.block_tables, case.kv_lens, 256, 0.25
    )
    torch.testing.assert_close(out, case.expected(), atol=5e-6, rtol=2e-5)
    ((grid, named, warps, stages),) = launches
    assert (grid, named["BLOCK_N"], named["LEAST"]) == ((2, batch, splits), tile, least)
    assert (warps, stages) == (2, 2)


@pytest.mark.parametrize(("count", "cut"), [(8, (16, 16, 4, 2)), (9, (32, 32, 4, 3)), (40, (64, 32, 8, 3))])
def test_prefill(make_case, watch, count, cut):
    launches = watch(paged_prefill, "_prefill_kernel")
    case = make_case([(count, count + 30)], 4, 2, 16, 16)
    tensors = (case.q, case.key_cache, case.value_cache, case.block_tables, case.cu_query, case.kv_lens)
    out = paged_prefill.paged_prefill(*tensors, count, case.max_kv, case.scale)
    torch.testing.assert_close(out, case.expected(), atol=5e-6, rtol=2e-5)
    ((_, named, warps, stages),) = launches
    assert (named["BLOCK_M"], named["BLOCK_N"], warps, stages) == cut


def test_gemv(device, watch):
    launches = watch(linear, "_gemv_kernel")
    x, weight = torch.randn(1, 24, device=device), torch.randn(5, 24, device=device)
    torch.testing.assert_close(linear.gemv(x, weight), x @ weight.T)
    ((grid, named, warps, _),) = launches
    assert (grid, named["ROWS"], warps) == ((3,), 2, 4)
