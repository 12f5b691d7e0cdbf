"""The product for one token against torch, with NaN in the output and around the weight."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import gemv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 2048), (3, 4096), (7, 100), (2, 3000), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_gemv(device, dtype, outputs, inputs, biased):
    random = torch.Generator().manual_seed(outputs * inputs)
    whole = torch.full((outputs, inputs + 24), torch.nan)
    whole[:, :inputs] = torch.randn(outputs, inputs, generator=random)
    weight = whole.to(device, dtype)[:, :inputs]
    x = torch.randn(1, inputs, generator=random).to(device, dtype)
    bias = torch.randn(outputs, generator=random).to(device, dtype) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = gemv(x, weight, bias)
    assert got.dtype == dtype
    assert got.shape == (1, outputs)
    slack = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.double(), expected, atol=slack * inputs**0.5, rtol=slack)
