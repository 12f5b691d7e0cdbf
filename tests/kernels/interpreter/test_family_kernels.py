"""What families other than the llamas need of kernels, against the references: experts, other rotations and gates."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import gelu_and_mul, gelu_and_mul_reference
from kernels.expert_gemv import fits
from kernels.moe import grouped_linear, grouped_linear_reference, launches_of, mixture
from kernels.norms import rms_norm, rms_norm_reference
from kernels.rotary import rotary_and_store, rotary_and_store_reference, rotary_embed, rotary_embed_reference
from kernels.routing import choose, choose_reference, route, route_reference


def randn(*shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "choices", "inputs", "outputs"),
                         [(1, 4, 2, 16, 24), (37, 3, 1, 40, 65), (50, 7, 3, 33, 130)])  # fmt: skip
def test_grouped_linear(device, tokens, experts, choices, inputs, outputs, dtype):
    random = torch.Generator().manual_seed(tokens)
    # Some experts get nothing, one gets much.
    chosen = torch.stack([torch.randperm(experts - 1, generator=random)[:choices] for _ in range(tokens)])
    routing = route(chosen.to(device), experts)
    x, weight = (
        randn(tokens, inputs, device=device, dtype=dtype),
        randn(experts, outputs, inputs, device=device, dtype=dtype),
    )
    bias = randn(experts, outputs, device=device, dtype=dtype)
    atol, rtol = (1e-4, 1e-4) if dtype == torch.float32 else (0.2, 0.05)
    out = grouped_linear(x, weight, bias, routing)
    torch.testing.assert_close(out, grouped_linear_reference(x, weight, bias, routing), atol=atol, rtol=rtol)
    shares = torch.rand(tokens, choices, generator=random).to(device)
    x = randn(tokens * choices, inputs, device=device, dtype=dtype)
    out = grouped_linear(x, weight, None, routing, shares)
    torch.testing.assert_close(out, grouped_linear_reference(x, weight, None, routing, shares), atol=atol, rtol=rtol)


def test_launches_for_the_compiler_are_those_of_all_steps_and_multiply_nothing(device):
    weight = torch.full((3, 20, 16), torch.nan, device=device)
    launches = [launches_of(weight, None, tokens, 2, shared=shared) for tokens in (1, 60, 500) for shared in (0, 1)]
    assert [len(found) for found in launches] == [1, 1, 3, 3, 4, 4]  # 16 rows; up to 64; up to 128
    for launch in launches[-1]:
        launch()


@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 3, 2), (33, 5, 2), (60, 64, 6)])
def test_routing(device, tokens, experts, choices):
    random = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(experts - 1, generator=random)[:choices] for _ in range(tokens)]).to(device)
    got, wanted = route(chosen, experts), route_reference(chosen, experts)
    assert torch.equal(got.order, wanted.order)
    assert torch.equal(got.starts, wanted.starts)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("experts", "choices", "normalize", "corrected"),
                         [(4, 2, True, False), (64, 6, False, True), (6, 6, True, True)])  # fmt: skip
def test_choices(device, experts, choices, normalize, corrected, sigmoid):
    logits = randn(9, experts, device=device, dtype=torch.bfloat16)
    correction = randn(experts, device=device) if corrected else None
    options = {"sigmoid": sigmoid, "normalize": normalize, "scale": 1.5}
    found = []
    for function in (choose, choose_reference):
        chosen, shares = function(logits, correction, choices, **options)
        assert chosen.dtype == torch.int64
        found.append(torch.zeros_like(logits, dtype=torch.float32).scatter_(1, chosen, shares))
    torch.testing.assert_close(found[0], found[1])


def test_choices_of_logits_that_are_no_numbers_are_experts(device):
    chosen, _ = choose(torch.full((2, 5), torch.nan, device=device), None, 3, sigmoid=False, normalize=True, scale=1.0)
    assert chosen.min() >= 0
    assert chosen.max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_single_token_has_the_mixture_that_it_has_among_others(device, with_bias, dtype):
    tokens, experts, choices, channels, inner = 3, 5, 2, 40, 24
    x = randn(tokens, channels, device=device, dtype=dtype)
    gate_up = randn(experts, 2 * inner, channels, device=device, dtype=dtype)
    down = randn(experts, channels, inner, device=device, dtype=dtype)
    biases = [randn(experts, n, device=device, dtype=dtype) if with_bias else None for n in (2 * inner, channels)]
    chosen = torch.tensor([[4, 0], [1, 3], [3, 4]], device=device)
    shares = torch.rand(tokens, choices, generator=torch.Generator().manual_seed(1)).to(device)

    def gate(rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :inner] * rows[:, inner:]

    wanted = mixture(x, gate_up, down, chosen, shares, gate, *biases)
    for i in range(tokens):
        one = slice(i, i + 1)
        assert fits(x[one], gate_up, down)
        got = mixture(x[one], gate_up, down, chosen[one].contiguous(), shares[one].contiguous(), gate, *biases)
        atol, rtol = (1e-3, 1e-4) if dtype == torch.float32 else (4.0, 0.03)
        torch.testing.assert_close(got, wanted[one], atol=atol, rtol=rtol)


@pytest.mark.parametrize("rotated", [10, 24])
def test_neighbours_are_rotated(device, rotated):
    q, k, v = (randn(5, heads, 24, device=device) for heads in (3, 2, 2))
    table, positions = randn(50, rotated, device=device), torch.tensor([0, 7, 3, 49, 1], device=device)
    for got, wanted in zip(rotary_embed(q, k, positions, table, interleaved=True),
                           rotary_embed_reference(q, k, positions, table, interleaved=True), strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted)
    caches = [torch.zeros(2, 16, 2, 24, device=device) for _ in range(4)]
    slots = torch.tensor([3, -1, 20, 21, 0], device=device)
    got = rotary_and_store(q, k, v, positions, table, *caches[:2], slots, interleaved=True)
    wanted = rotary_and_store_reference(q, k, v, positions, table, *caches[2:], slots, interleaved=True)
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(caches[:2], caches[2:], strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_and_mul(device, approximate):
    x = 3 * randn(3, 2 * 1030, device=device)
    wanted = gelu_and_mul_reference(x, approximate)
    torch.testing.assert_close(gelu_and_mul(x, approximate=approximate), wanted, atol=1e-5, rtol=1e-4)


def test_a_norm_with_a_weight_in_fp32(device):
    x, weight = randn(3, 40, device=device, dtype=torch.bfloat16), 1 + randn(40, device=device)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    # The interpreter cuts what a GPU rounds: one unit in the last place.
    torch.testing.assert_close(got, rms_norm_reference(x, weight, 1e-6), atol=0.0, rtol=0.008)
