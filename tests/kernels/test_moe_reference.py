"""The mixture of experts in torch against one token and one expert at a time."""

from __future__ import annotations

import torch

from kernels.activation import silu_and_mul_reference
from kernels.moe import mixture
from kernels.routing import route


def test_routing_has_every_entry_once_by_expert() -> None:
    experts = torch.tensor([[3, 0], [1, 3], [3, 1]])
    routing = route(experts, 5)
    assert routing.order.tolist() == [1, 2, 5, 0, 3, 4]  # within an expert as they came
    assert routing.starts.tolist() == [0, 1, 3, 3, 6, 6]


def test_a_mixture_is_the_weighed_sum_of_its_experts() -> None:
    random = torch.Generator().manual_seed(0)
    tokens, channels, inner, count, choices = 7, 10, 6, 5, 3
    x = torch.randn(tokens, channels, generator=random)
    gate_up = torch.randn(count, 2 * inner, channels, generator=random)
    down = torch.randn(count, channels, inner, generator=random)
    first, second = torch.randn(count, 2 * inner, generator=random), torch.randn(count, channels, generator=random)
    experts = torch.stack([torch.randperm(count, generator=random)[:choices] for _ in range(tokens)])
    shares = torch.rand(tokens, choices, generator=random)
    want = torch.zeros(tokens, channels)
    for t in range(tokens):
        for e, share in zip(experts[t].tolist(), shares[t], strict=True):
            hidden = silu_and_mul_reference(x[t : t + 1] @ gate_up[e].T + first[e])
            want[t] += share * (hidden @ down[e].T + second[e])[0]
    got = mixture(x, gate_up, down, experts, shares, silu_and_mul_reference, first, second)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
