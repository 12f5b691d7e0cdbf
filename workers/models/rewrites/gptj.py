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
from workers.models.sharding import column_parallel, row_parallel
from workers.parallel.group import Group


class CodeGenAttention(nn.Module):
    """Attention over the paged cache. q, k and v are one projection in four interleaved parts: it is not split."""

    scale_attn: float

    def _attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        """query, key and value [1, H, T, D] -> [1, H, T, D]."""
        q, k = query.to(value.dtype), key.to(value.dtype)
        return paged_attention(self, q, k, value, scale=1.0 / self.scale_attn).transpose(1, 2), None


class GPTJAttention(CodeGenAttention):
    """As CodeGen's, with projections of their own for q, k and v: heads are split over the ranks."""

    num_attention_heads: int
    tensor_group: Group

    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        """q, k and v by column, the output by row."""
        if mod_name in ("q_proj", "k_proj", "v_proj"):
            column_parallel(mod, device_mesh)
        elif mod_name == "out_proj":
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: tuple[torch.Tensor, Any], device_mesh: Group) -> tuple[torch.Tensor, Any]:
        """Sum the ranks' shares."""
        device_mesh.all_reduce(outputs[0])
        return outputs

    def _update_model_fn(self) -> None:
        """This rank's number of heads."""
        ranks, heads = self.tensor_group.size, self.num_attention_heads
        if heads % ranks:
            raise ConfigError(f"{heads} heads of GPT-J's attention, which {ranks} tensor-parallel ranks do not divide")
        self.num_attention_heads = heads // ranks


class GPTJMLP(nn.Module):
    """The feed-forward layer of GPT-J and CodeGen, cut over the ranks."""

    @classmethod
    def _distribute_partition_fn(cls, mod_name: str, mod: nn.Module, device_mesh: Group) -> None:
        """The first by column, the second by row."""
        if mod_name == "fc_in":
            column_parallel(mod, device_mesh)
        elif mod_name == "fc_out":
            row_parallel(mod, device_mesh)

    @classmethod
    def _distribute_output_fn(cls, outputs: torch.Tensor, device_mesh: Group) -> torch.Tensor:
        """Sum the ranks' shares."""
        return device_mesh.all_reduce(outputs)
