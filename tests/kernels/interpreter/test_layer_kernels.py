"""Norms, activation, rotary embedding and the cache write: kernels against references."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_and_mul, silu_and_mul_reference
from kernels.backend import INTERPRETED
from kernels.kv_cache import store_kv, store_kv_reference
from kernels.norms import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rotary import rotary_and_store, rotary_and_store_reference, rotary_embed, rotary_embed_reference

TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}
DTYPES = list(TOLERANCE)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    atol, rtol = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, atol=atol, rtol=rtol, equal_nan=True)


@pytest.fixture
def randn(device):
    random = torch.Generator().manual_seed(11)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=random).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (3, 72), (5, 1000)])
def test_norms(randn, dtype, tokens, channels):
    x = randn(tokens, 2 * channels, dtype=dtype)[:, :channels]
    residual, weight = randn(tokens, channels, dtype=dtype), randn(channels, dtype=dtype)
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    if INTERPRETED and dtype == torch.bfloat16:
        close(total, expected_total)  # The interpreter truncates to bf16 where a device rounds.
    else:
        assert torch.equal(total, expected_total)
    close(normed, expected_normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 100, 1500])
def test_silu_and_mul(randn, dtype, channels):
    x = randn(3, 2 * channels, dtype=dtype) * 4
    close(silu_and_mul(x), silu_and_mul_reference(x))


def test_no_tokens(randn):
    assert rms_norm(randn(0, 8), randn(8), 1e-5).shape == (0, 8)
    assert silu_and_mul(randn(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(("kv_heads", "size", "block"), [(1, 16, 16), (3, 24, 32), (8, 128, 64)])
def test_store_kv(randn, device, kv_heads, size, block):
    qkv = randn(5, 3 * kv_heads, size)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    slots = torch.tensor([3 * block - 1, -1, 0, block + 1, -7], device=device)
    got = torch.full((2, 3, block, kv_heads, size), torch.nan, device=device)
    wanted = got.clone()
    store_kv(k, v, got[0], got[1], slots)
    store_kv_reference(k, v, wanted[0], wanted[1], slots)
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


ROTARY = [(1, 1, 16, 16), (6, 2, 24, 24), (9, 3, 40, 24), (32, 8, 64, 64), (8, 1, 128, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "rotary"), ROTARY)
def test_rotary(randn, device, dtype, heads, kv_heads, size, rotary):
    qkv = randn(4, heads + 2 * kv_heads, size, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    positions = torch.tensor([0, 30, 7, 7], device=device, dtype=torch.int32)
    cos_sin = randn(31, rotary)
    for got, wanted in zip(
        rotary_embed(q, k, positions, cos_sin), rotary_embed_reference(q, k, positions, cos_sin), strict=True
    ):
        close(got, wanted)
    got = torch.full((3, 2, 16, kv_heads, size), torch.nan, device=device, dtype=dtype)
    wanted = got.clone()
    slots = torch.tensor([40, 0, -1, 16], device=device)
    fused = rotary_and_store(q, k, v, positions, cos_sin, got[:, 0], got[:, 1], slots)
    caches = [wanted[:, side].contiguous() for side in (0, 1)]
    close(fused, rotary_and_store_reference(q, k, v, positions, cos_sin, *caches, slots))
    for side in (0, 1):
        close(got[:, side], caches[side])
