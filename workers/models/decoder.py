"""The parts that decoders are made of, and the model that they make.

A family picks its parts: settings say which blocks, norms, biases, ropes and scores; where that is not enough, a class
attribute says which attention and `make_mlp` which feed-forward layer.

Shapes: T tokens, C channels, V vocabulary, H query heads, K KV heads, D head size, counts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from workers.api.config import KVCacheSpec
from workers.layers.attention import Attention, Sinks, alibi_slopes
from workers.layers.build import Build
from workers.layers.embedding import NormalizedLMHead, ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import QKVParallelLinear, RowParallelLinear
from workers.layers.moe import Experts
from workers.layers.norm import HeadNorm, LayerNorm, OffsetRMSNorm, RMSNorm, ShardedRMSNorm
from workers.layers.rotary import RopeSettings, RotaryEmbedding
from workers.models.base import CausalModel
from workers.models.feed_forward import make_feed_forward
from workers.models.settings import BlockKind, DecoderSettings
from workers.parallel.group import Group

Norm: TypeAlias = RMSNorm | LayerNorm


def make_norm(s: DecoderSettings, channels: int, *, build: Build) -> Norm:
    """The family's norm over `channels`."""
    if s.norm == "offset_rms":
        return OffsetRMSNorm(channels, s.eps, build=build)
    if s.norm == "rms":
        return RMSNorm(channels, s.eps, build=build)
    return LayerNorm(channels, s.eps, build=build, bias=s.norm == "layer")


class DecoderAttention(nn.Module):
    """q, k and v by one product, attention, output projection."""

    ends_with: ClassVar[str] = "o_proj"
    logn: torch.Tensor

    def __init__(
        self, name: str, layer: int, s: DecoderSettings, rotary: RotaryEmbedding | None, max_len: int, *, build: Build
    ) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            f"{name}.qkv_proj", s.hidden, s.heads, s.kv_heads, s.head_size, bias=s.qkv_bias, build=build,
            layout=s.qkv_layout,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj", s.heads * s.head_size, s.hidden, bias=s.output_bias, build=build
        )
        self.head_size, self.sizes, self.clip = s.head_size, self.qkv_proj.sizes, s.qkv_clip
        self.over_all_heads = s.qk_norm == "width"
        self.q_norm = self._head_norm(s, s.heads, self.qkv_proj.num_heads, "q", build)
        self.k_norm = self._head_norm(s, s.kv_heads, self.qkv_proj.num_kv_heads, "k", build)
        self.sinks = Sinks(s.heads, build=build) if s.sinks else None
        self.attention = Attention(
            layer,
            self.qkv_proj.num_heads,
            self.qkv_proj.num_kv_heads,
            s.head_size,
            scale=s.scale or s.head_size**-0.5,
            window=s.windows[layer],
            rotary=rotary,
            soft_cap=s.soft_cap,
            slopes=alibi_slopes(s.heads, build=build) * s.alibi if s.alibi else None,
            sinks=self.sinks,
        )
        self.register_buffer("logn", _logn(s.logn, max_len, build) if s.logn else None, persistent=False)

    def _head_norm(self, s: DecoderSettings, heads: int, local: int, of: str, build: Build) -> nn.Module | None:
        if not s.qk_norm:
            return None
        if s.qk_norm == "head":
            return make_norm(s, s.head_size, build=build)
        copies = local * build.groups.tp.size // heads
        if s.qk_norm == "width":
            return ShardedRMSNorm(heads * s.head_size, s.eps, build=build, copies=copies)
        first = build.groups.tp.rank // copies * local
        return HeadNorm(heads, local, first, s.head_size, s.eps, build=build)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, C], positions [T] -> [T, C]."""
        qkv = self.qkv_proj(x)
        q, k, v = (qkv.clamp(-self.clip, self.clip) if self.clip else qkv).split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            if self.over_all_heads:
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                q = self.q_norm(q.unflatten(-1, (-1, self.head_size))).flatten(1)
                k = self.k_norm(k.unflatten(-1, (-1, self.head_size))).flatten(1)
        if self.logn is not None:
            q = q * self.logn[positions].unsqueeze(1)
        return self.o_proj(self.attention(q, k, v, positions))


def _logn(trained: int, max_len: int, build: Build) -> torch.Tensor:
    """What the query of each position is multiplied by: log(n) / log(trained) from the n-th token on."""
    count = torch.arange(1, max_len + 1, dtype=torch.float64)
    return (count.log() / math.log(trained)).clamp(min=1.0).to(build.device, build.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm. The residual stream is carried beside the block's output."""

    def __init__(self, s: DecoderSettings, attention: nn.Module, mlp: nn.Module, *, build: Build) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.scale = attention, mlp, s.residual_scale
        self.make_norms(s, build)

    def make_norms(self, s: DecoderSettings, build: Build) -> None:
        """The norms of this kind of block."""
        self.input_layernorm = make_norm(s, s.hidden, build=build)
        self.post_attention_layernorm = make_norm(s, s.hidden, build=build)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual [T, C] -> output not yet added, residual."""
        x, residual = enter(self.input_layernorm, x, residual)
        x, residual = self.post_attention_layernorm.add(self.scaled(self.self_attn(x, positions)), residual)
        return self.scaled(self.mlp(x)), residual

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream."""
        return x if self.scale == 1.0 else x * self.scale


def enter(norm: Norm, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); the first block of a model has no residual yet."""
    return (norm(x), x) if residual is None else norm.add(x, residual)


class SandwichBlock(Block):
    """Norms before and behind attention and feed-forward (Gemma2)."""

    def make_norms(self, s: DecoderSettings, build: Build) -> None:
        """See `Block`."""
        super().make_norms(s, build)
        self.pre_feedforward_layernorm = make_norm(s, s.hidden, build=build)
        self.post_feedforward_layernorm = make_norm(s, s.hidden, build=build)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Block`."""
        x, residual = enter(self.input_layernorm, x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, positions))
        x, residual = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class PostNormBlock(Block):
    """Norms behind attention and feed-forward only (OLMo2)."""

    def make_norms(self, s: DecoderSettings, build: Build) -> None:
        """See `Block`."""
        self.post_attention_layernorm = make_norm(s, s.hidden, build=build)
        self.post_feedforward_layernorm = make_norm(s, s.hidden, build=build)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Block`."""
        total = x if residual is None else x + residual
        total = total + self.post_attention_layernorm(self.self_attn(total, positions))
        return self.post_feedforward_layernorm(self.mlp(total)), total


class ParallelBlock(Block):
    """Attention and feed-forward beside each other behind one norm (Phi, Cohere)."""

    def make_norms(self, s: DecoderSettings, build: Build) -> None:
        """See `Block`."""
        self.input_layernorm = make_norm(s, s.hidden, build=build)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Block`."""
        x, residual = enter(self.input_layernorm, x, residual)
        return self.self_attn(x, positions) + self.mlp(x), residual


class ParallelNormsBlock(Block):
    """Attention and feed-forward beside each other, each behind a norm of its own (GPT-NeoX)."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Block`."""
        x, residual = enter(self.input_layernorm, x, residual)
        return self.self_attn(x, positions) + self.mlp(self.post_attention_layernorm(residual)), residual


def defer_sums(blocks: Iterable[nn.Module], last: nn.Module, group: Group) -> None:
    """Leave sums over `group` to the root mean square norms behind them, where nothing stands between the two.

    `last` is the norm behind the last of `blocks`. Modules whose output is that of a product name it: `ends_with`.
    """
    waiting: nn.Module | None = None  # the product that the next norm may sum
    for block in blocks:
        if type(block) is not Block or block.scale != 1.0:
            waiting = None
            continue
        _defer(waiting, block.input_layernorm, group)
        _defer(_last_product(block.self_attn), block.post_attention_layernorm, group)
        waiting = _last_product(block.mlp)
    _defer(waiting, last, group)


def _last_product(module: nn.Module) -> nn.Module | None:
    return getattr(module, getattr(module, "ends_with", ""), None)


def _defer(product: nn.Module | None, norm: nn.Module, group: Group) -> None:
    if isinstance(product, RowParallelLinear) and isinstance(norm, RMSNorm):
        product.deferred = True
        norm.sum_first(group)


BLOCKS: dict[BlockKind, type[Block]] = {
    "sequential": Block,
    "sandwich": SandwichBlock,
    "post_norm": PostNormBlock,
    "parallel": ParallelBlock,
    "parallel_norms": ParallelNormsBlock,
}


class Stack(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, family: type[DecoderModel], s: DecoderSettings, max_len: int, *, build: Build) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(s.vocab_size, s.hidden, build=build)
        # As torch does it: the factor has the dtype of what it scales.
        self.scale = float(torch.tensor(s.embedding_scale, dtype=build.dtype))
        ropes: list[tuple[RopeSettings, RotaryEmbedding]] = []
        self.layers = nn.ModuleList()
        for i in range(s.layers):
            name, rope, rotary = f"model.layers.{i}", s.rope_of(i), None
            if rope is not None:
                rotary = next((table for known, table in ropes if known == rope), None)
                if rotary is None:
                    size = family.rotary_size(s)
                    rotary = RotaryEmbedding(rope, size, max_len, device=build.device, interleaved=s.interleaved)
                    ropes.append((rope, rotary))
            attention = family.attention_type(f"{name}.self_attn", i, s, rotary, max_len, build=build)
            mlp = family.make_mlp(f"{name}.mlp", i, s, build=build)
            self.layers.append(BLOCKS[s.block](s, attention, mlp, build=build))
        self.norm = make_norm(s, s.hidden, build=build)
        if build.groups.tp.fuses:
            defer_sums(self.layers, self.norm, build.groups.tp)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T], [T] -> [T, C]."""
        x, residual = self.embed_tokens(input_ids), None
        if self.scale != 1.0:
            x = x * self.scale
        for layer in self.layers:
            x, residual = layer(x, residual, positions)
        return enter(self.norm, x, residual)[0]


class DecoderModel(CausalModel):
    """A decoder made of parts. A family gives at least `read_settings` and its weight rules."""

    attention_type: ClassVar[Callable[..., nn.Module]] = DecoderAttention

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__(config, max_model_len=max_model_len, build=build)
        s = self.settings = self.read_settings(config)
        self.vocab_size, self.num_layers = s.vocab_size, s.layers
        self.max_positions = self.context_length(config)
        self.dtype = build.dtype
        self.model = Stack(type(self), s, max_model_len, build=build)
        grown = [m.settings.trained for m in self.modules() if isinstance(m, RotaryEmbedding) and m.by_length]
        self.prompts_apart_from = min(grown, default=None)
        self.batch_invariant = build.batch_invariant and not any(isinstance(m, Experts) for m in self.modules())
        tied = self.model.embed_tokens if s.tied else None
        head = NormalizedLMHead if s.head_normalized else ParallelLMHead
        self.lm_head = head(s.vocab_size, s.hidden, build=build, tied=tied, bias=s.head_bias)

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> DecoderSettings:
        """The settings of this family. Raises ConfigError."""
        raise NotImplementedError

    @classmethod
    def make_mlp(cls, name: str, layer: int, s: DecoderSettings, *, build: Build) -> nn.Module:
        """The feed-forward part of one layer."""
        return make_feed_forward(name, layer, s, build=build)

    @classmethod
    def rotary_size(cls, s: DecoderSettings) -> int:
        """Channels of a head, of which the rope's settings say how many are rotated."""
        return s.head_size

    @classmethod
    def longest_context(cls, config: Mapping[str, Any]) -> int:
        """See `CausalModel`."""
        rope = cls.read_settings(config).rope
        return max(cls.context_length(config), 0 if rope is None else rope.reach)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        return self.model(input_ids, positions)

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        s, logits = self.settings, self.lm_head(hidden)
        if s.logit_scale != 1.0:
            logits = logits * s.logit_scale
        return torch.tanh(logits / s.logit_soft_cap) * s.logit_soft_cap if s.logit_soft_cap else logits

    def gather_logits(self, own: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        return self.lm_head.gather(own)

    def greedy_tokens(self, own: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        return self.lm_head.greedy(own)

    def kv_cache_specs(self) -> tuple[KVCacheSpec, ...]:
        """One group for each window."""
        attention = self.model.layers[0].self_attn.attention  # type: ignore[union-attr]
        windows = self.settings.windows
        return tuple(
            KVCacheSpec(
                layers=tuple(i for i, w in enumerate(windows) if w == window),
                num_kv_heads=attention.num_kv_heads,  # type: ignore[union-attr, arg-type]
                head_size=attention.head_size,  # type: ignore[union-attr, arg-type]
                dtype=str(self.dtype).removeprefix("torch."),
                window=window,
            )
            for window in sorted(set(windows))
        )
