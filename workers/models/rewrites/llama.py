"""Llama as transformers has it, with our kernels: rotation and write to the cache in one, norms, gated activation.

Shapes: T tokens, C channels, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.activation import silu_and_mul
from kernels.norms import rms_norm
from workers.models.paged import paged_attention
from workers.models.rewrites.cut import CutModule, join_weights


class LlamaAttention(CutModule):
    """q, k and v by one product, attention over the paged cache; heads are split over the ranks."""

    by_column = ("q_proj", "k_proj", "v_proj")
    by_row = "o_proj"

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    scaling: float
    head_dim: int
    qkv_sizes: list[int]
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [1, T, C], cosines and sines [1, T, D] -> [1, T, C]."""
        tokens, size = hidden_states.shape[1], self.head_dim
        qkv = torch.nn.functional.linear(hidden_states[0], self.qkv_weight, self.qkv_bias)
        q, k, v = (x.view(tokens, -1, size).transpose(0, 1)[None] for x in qkv.split(self.qkv_sizes, dim=-1))
        cos, sin = (x[:, None] for x in position_embeddings)
        q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        out = paged_attention(self, q, k, v, scale=self.scaling)
        return self.o_proj(out.flatten(2)), None

    def _update_model_fn(self) -> None:
        """One weight for the three projections, of which they keep views."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        self.qkv_sizes = [linear.weight.shape[0] for linear in linears]
        self.qkv_weight, self.qkv_bias = join_weights(linears)


class LlamaMLP(CutModule):
    """Gate and up by one product, one kernel between it and the last."""

    by_column = ("gate_proj", "up_proj")
    by_row = "down_proj"

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    gate_up_weight: torch.Tensor
    gate_up_bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, C] -> [1, T, C]."""
        both = torch.nn.functional.linear(x[0], self.gate_up_weight, self.gate_up_bias)
        return self.down_proj(silu_and_mul(both))[None]

    def _update_model_fn(self) -> None:
        """One weight for gate and up, of which they keep views."""
        self.gate_up_weight, self.gate_up_bias = join_weights((self.gate_proj, self.up_proj))


class LlamaRMSNorm(nn.Module):
    """The norm as one kernel."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [1, T, C] -> [1, T, C]."""
        return rms_norm(hidden_states[0], self.weight, self.variance_epsilon)[None]


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The pairs of channels (i, i + D / 2) turned by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
