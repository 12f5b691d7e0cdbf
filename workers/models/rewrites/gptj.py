"""GPT-J and CodeGen: their attention knows no attention functions, so that transformers alone cannot page it.

Only the inner part, `_attn`, is replaced; projections, rotation and heads stay transformers'.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workers.api.errors import ConfigError
from workers.models.paged import paged_attention
from workers.models.rewrites.cut import CutModule
from workers.parallel.group import Group


class _Attention(nn.Module):
    """Attention over the paged cache."""

    scale_attn: float

    def _attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        """query, key and value [1, H, T, D] -> [1, H, T, D]."""
        q, k = query.to(value.dtype), key.to(value.dtype)
        return paged_attention(self, q, k, value, scale=1.0 / self.scale_attn).transpose(1, 2), None


class CodeGenAttention(_Attention):
    """q, k and v are one projection in four interleaved parts: it is not split."""


class GPTJAttention(CutModule, _Attention):
    """Projections of their own for q, k and v: heads are split over the ranks."""

    num_attention_heads: int
    tensor_group: Group
    by_column = ("q_proj", "k_proj", "v_proj")
    by_row = "out_proj"

    def _update_model_fn(self) -> None:
        """This rank's number of heads."""
        ranks, heads = self.tensor_group.size, self.num_attention_heads
        if heads % ranks:
            raise ConfigError(f"{heads} heads of GPT-J's attention, which {ranks} tensor-parallel ranks do not divide")
        self.num_attention_heads = heads // ranks


class GPTJMLP(CutModule):
    """The feed-forward layer of GPT-J and CodeGen, cut over the ranks."""

    by_column = ("fc_in",)
    by_row = "fc_out"
