"""Norms, activation, rotary embedding and the cache write against transformers and against plain loops."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_and_mul
from kernels.kv_cache import store_kv
from kernels.norms import add_rms_norm, rms_norm
from kernels.rotary import rotary_and_store, rotary_embed


def table(positions: int, size: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions).float(), 10_000.0 ** -(torch.arange(0, size, 2) / size))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_equal_transformers_bit_for_bit(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(1)
    norm = llama.LlamaRMSNorm(72, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(9, 72).to(dtype), torch.randn(9, 72).to(dtype)
    weight = norm.weight.detach()
    assert torch.equal(rms_norm(x, weight, 1e-5), norm(x))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))
    assert normed.dtype == total.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_with_an_offset_equal_gemmas(dtype):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    torch.manual_seed(1)
    norm = gemma.GemmaRMSNorm(72, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, weight = torch.randn(9, 72).to(dtype), 1.0 + norm.weight.detach().float()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), norm(x), atol=0.0, rtol=1e-6)


def test_gate_comes_first():
    torch.manual_seed(2)
    x = torch.randn(5, 14)
    expected = x[:, :7] * torch.sigmoid(x[:, :7]) * x[:, 7:]
    torch.testing.assert_close(silu_and_mul(x), expected)


@pytest.mark.parametrize("size", [16, 48])
def test_rotary_equals_transformers(size):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(3)
    q, k, positions = torch.randn(7, 6, size), torch.randn(7, 2, size), torch.tensor([5, 0, 99, 3, 3, 41, 7])
    cos_sin = table(100, size)
    cos, sin = cos_sin[positions].repeat_interleave(1, dim=0).chunk(2, dim=-1)
    both = [torch.cat([half, half], dim=-1).unsqueeze(0) for half in (cos, sin)]
    wanted = llama.apply_rotary_pos_emb(q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), *both)
    for got, want in zip(rotary_embed(q, k, positions, cos_sin), wanted, strict=True):
        torch.testing.assert_close(got, want[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_channels_past_the_rotary_size_are_copied():
    torch.manual_seed(4)
    q, k, positions = torch.randn(3, 2, 20), torch.randn(3, 1, 20), torch.tensor([1, 2, 30])
    rotated, _ = rotary_embed(q, k, positions, table(31, 8))
    whole, _ = rotary_embed(q[..., :8], k[..., :8], positions, table(31, 8))
    assert torch.equal(rotated[..., 8:], q[..., 8:])
    assert torch.equal(rotated[..., :8], whole)


def test_store_writes_its_slots_and_no_other():
    torch.manual_seed(5)
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    key_cache, value_cache = torch.full((3, 4, 2, 8), torch.nan), torch.full((3, 4, 2, 8), torch.nan)
    store_kv(k, v, key_cache, value_cache, torch.tensor([11, -1, 0, 6]))
    for new, cache in ((k, key_cache), (v, value_cache)):
        assert torch.equal(cache[2, 3], new[0])
        assert torch.equal(cache[0, 0], new[2])
        assert torch.equal(cache[1, 2], new[3])
        assert int(cache.isnan().all(dim=-1).all(dim=-1).sum()) == 12 - 3


def test_rotary_and_store_is_the_two_in_turn():
    torch.manual_seed(6)
    qkv = torch.randn(5, 4 + 2 + 2, 16)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    positions, slots = torch.tensor([0, 1, 2, 9, 10]), torch.tensor([4, 5, 6, -1, 0])
    caches = [torch.zeros(2, 4, 2, 16) for _ in range(4)]
    rotated = rotary_and_store(q, k, v, positions, table(11, 16), caches[0], caches[1], slots)
    expected_q, expected_k = rotary_embed(q, k, positions, table(11, 16))
    store_kv(expected_k, v, caches[2], caches[3], slots)
    assert torch.equal(rotated, expected_q)
    for cache, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("size", [16, 12])
def test_parts_of_one_projection_rotate_as_copies_of_them_do(tokens, size):
    torch.manual_seed(7)
    # The merged layout, and look-alikes: k before q, a gap, tensors of their own.
    whole = torch.randn(tokens, 5 + 2 + 1, 16)
    positions = torch.arange(3, 3 + tokens)
    orders = ((slice(0, 5), slice(5, 7)), (slice(2, 7), slice(0, 2)), (slice(0, 5), slice(6, 8)))
    for heads, kv_heads in orders:
        q, k = whole[:, heads], whole[:, kv_heads]
        wanted = rotary_embed(q.clone(), k.clone(), positions, table(11, size))
        for got, want in zip(rotary_embed(q, k, positions, table(11, size)), wanted, strict=True):
            assert torch.equal(got, want)


def test_layers_share_positions_and_slots_by_a_memo():
    torch.manual_seed(8)
    positions, slots, memo, tables = torch.tensor([4, 0, 9]), torch.tensor([3, -1, 6]), {}, (table(10, 8), table(12, 8))
    tables[1].neg_()
    for cos_sin in (*tables, tables[0]):
        q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        caches = [torch.zeros(2, 4, 2, 8) for _ in range(4)]
        shared = rotary_and_store(q, k, v, positions, cos_sin, *caches[:2], slots, memo)
        assert torch.equal(shared, rotary_and_store(q, k, v, positions, cos_sin, *caches[2:], slots))
        assert torch.equal(caches[0], caches[2])
        assert torch.equal(caches[1], caches[3])
        assert int((caches[1] != 0).any(-1).any(-1).sum()) == 2
