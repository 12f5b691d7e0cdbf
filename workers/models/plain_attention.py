"""Attention over the paged cache in plain torch, for what the kernels do not know: chunks, soft caps, sinks.

One sequence after the other, and the host waits for the lengths: right, not fast.

Shapes: T tokens, H query heads, K KV heads, D head size, L tokens of one sequence that are known, Q of them new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.kv_cache import store_kv
from workers import context
from workers.layers.attention import Attention
from workers.models.step_context import step_context


class PlainAttention(Attention):
    """As `Attention`, with a `chunk` (tokens; 0 = none) beyond which nothing is seen, and a soft cap."""

    def __init__(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        scale: float,
        window: int = 0,
        chunk: int = 0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(layer_index, num_heads, num_kv_heads, head_size, scale=scale, window=window)
        self.chunk, self.softcap = chunk, softcap

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [T, H * D], k and v [T, K * D], sinks [H] -> [T, H * D]. Needs a step."""
        step, cache = step_context(), context.current().caches[self.layer_index]
        tokens, size = q.shape[0], self.head_size
        kv = (tokens, self.num_kv_heads, size)
        store_kv(k.view(kv), v.view(kv), cache.key, cache.value, step.slots, step.attention.memo)
        q, out = q.view(tokens, self.num_heads, size), torch.zeros_like(q)
        rows = zip(step.q_start_loc.tolist(), step.seq_length.tolist(), step.kv_seq_length.tolist(), strict=True)
        for (start, count, known), table in zip(rows, step.block_offsets, strict=True):
            if count:
                keys, values = (c[table.long()].flatten(0, 1)[:known] for c in (cache.key, cache.value))
                out[start : start + count] = self._one(q[start : start + count], keys, values, sinks).flatten(1)
        return out

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """q [Q, H, D], k and v [L, K, D] -> [Q, H, D]; the Q are the last of the L."""
        groups = self.num_heads // self.num_kv_heads
        k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
        scores = torch.einsum("qhd,lhd->hql", q.float() * self.scale, k)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        seen = torch.arange(len(k), device=q.device)
        own = seen[len(k) - len(q) :, None]
        visible = seen <= own
        if self.window:
            visible &= seen > own - self.window
        if self.chunk:
            visible &= seen // self.chunk == own // self.chunk
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            column = sinks.float().view(-1, 1, 1).expand(-1, len(q), 1)
            weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        return torch.einsum("hql,lhd->qhd", weights, v).to(q.dtype)

    def launches(
        self, cache: context.LayerCache, tokens: int, sequences: int, *, batch_invariant: bool = False
    ) -> list[Callable[[], None]]:
        """None: no kernel is launched."""
        return []

    def plan_long_prompts(self, cache: context.LayerCache, tokens: int) -> bool:
        """Never."""
        return False
