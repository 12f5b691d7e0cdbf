"""The llama family: Llama, Mistral (sliding window), Qwen2 (biases on q, k, v), Qwen3 (norms on q and k).

Shapes: T tokens, C channels, V vocabulary, H query heads, K KV heads, D head size, counts of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workers.api.config import KVCacheSpec
from workers.api.errors import ConfigError
from workers.layers.activation import SiluAndMul
from workers.layers.attention import Attention
from workers.layers.build import Build
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.norm import RMSNorm
from workers.layers.rotary import RopeSettings, RotaryEmbedding
from workers.models.base import CausalModel, WeightRule, require


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """The numbers of a checkpoint. Sizes in channels; `windows` has an entry a layer, 0 for full attention."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    rope: RopeSettings
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]

    @staticmethod
    def from_config(
        config: Mapping[str, Any],
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: bool = False,
        windows: tuple[int, ...] | None = None,
    ) -> LlamaSettings:
        """From a config.json; the flags are what differs between the models of the family."""
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(f"hidden_act {activation!r} is not supported, only silu")
        if config.get("quantization_config"):
            raise ConfigError("the checkpoint is quantized; that is not supported yet")
        hidden, heads = int(require(config, "hidden_size")), int(require(config, "num_attention_heads"))
        layers = int(require(config, "num_hidden_layers"))
        return LlamaSettings(
            vocab_size=int(require(config, "vocab_size")),
            hidden=hidden,
            intermediate=int(require(config, "intermediate_size")),
            layers=layers,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeSettings.from_config(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=qk_norm,
            windows=windows or (0,) * layers,
        )


class LlamaAttention(nn.Module):
    """q, k and v by one product, attention, output projection."""

    def __init__(self, name: str, layer: int, s: LlamaSettings, rotary: RotaryEmbedding, *, build: Build) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            f"{name}.qkv_proj", s.hidden, s.heads, s.kv_heads, s.head_size, bias=s.qkv_bias, build=build
        )
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj", s.heads * s.head_size, s.hidden, bias=s.output_bias, build=build
        )
        self.head_size, self.sizes = s.head_size, self.qkv_proj.sizes
        self.q_norm = RMSNorm(s.head_size, s.eps, build=build) if s.qk_norm else None
        self.k_norm = RMSNorm(s.head_size, s.eps, build=build) if s.qk_norm else None
        self.attention = Attention(
            layer,
            self.qkv_proj.num_heads,
            self.qkv_proj.num_kv_heads,
            s.head_size,
            scale=s.head_size**-0.5,
            window=s.windows[layer],
            rotary=rotary,
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, C], positions [T] -> [T, C]."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_size))).flatten(1)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_size))).flatten(1)
        return self.o_proj(self.attention(q, k, v, positions))


class LlamaMLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, name: str, s: LlamaSettings, *, build: Build) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            f"{name}.gate_up_proj",
            s.hidden,
            {"gate": s.intermediate, "up": s.intermediate},
            bias=s.mlp_bias,
            build=build,
        )
        self.down_proj = RowParallelLinear(f"{name}.down_proj", s.intermediate, s.hidden, bias=s.mlp_bias, build=build)
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class LlamaLayer(nn.Module):
    """Attention and feed-forward with their norms. The residual stream is carried beside the layer's output."""

    def __init__(self, name: str, layer: int, s: LlamaSettings, rotary: RotaryEmbedding, *, build: Build) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.eps, build=build)
        self.self_attn = LlamaAttention(f"{name}.self_attn", layer, s, rotary, build=build)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps, build=build)
        self.mlp = LlamaMLP(f"{name}.mlp", s, build=build)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual [T, C] -> output not yet added, residual."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, positions)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class LlamaStack(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, s: LlamaSettings, max_model_len: int, *, build: Build) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(s.vocab_size, s.hidden, build=build)
        rotary = RotaryEmbedding(s.rope, s.head_size, max_model_len, device=build.device)
        self.layers = nn.ModuleList(LlamaLayer(f"model.layers.{i}", i, s, rotary, build=build) for i in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps, build=build)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T], [T] -> [T, C]."""
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, positions)
        return self.norm(x) if residual is None else self.norm.add(x, residual)[0]


class LlamaForCausalLM(CausalModel):
    """Llama, and the base of its relatives."""

    weight_rules = (
        WeightRule("model.layers.*.self_attn.q_proj.*", "model.layers.*.self_attn.qkv_proj.*", "q"),
        WeightRule("model.layers.*.self_attn.k_proj.*", "model.layers.*.self_attn.qkv_proj.*", "k"),
        WeightRule("model.layers.*.self_attn.v_proj.*", "model.layers.*.self_attn.qkv_proj.*", "v"),
        WeightRule("model.layers.*.mlp.gate_proj.*", "model.layers.*.mlp.gate_up_proj.*", "gate"),
        WeightRule("model.layers.*.mlp.up_proj.*", "model.layers.*.mlp.gate_up_proj.*", "up"),
        WeightRule("model.layers.*.self_attn.rotary_emb.inv_freq", None),  # checkpoints of 2023
    )

    def __init__(self, config: Mapping[str, Any], *, max_model_len: int, build: Build) -> None:
        super().__init__(config, max_model_len=max_model_len, build=build)
        s = self.settings = self.read_settings(config)
        self.vocab_size, self.num_layers = s.vocab_size, s.layers
        self.max_positions = self.context_length(config)
        self.dtype = build.dtype
        self.model = LlamaStack(s, max_model_len, build=build)
        self.lm_head = ParallelLMHead(
            s.vocab_size, s.hidden, build=build, tied=self.model.embed_tokens if s.tied else None
        )

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> LlamaSettings:
        """The settings of this member of the family."""
        bias = bool(config.get("attention_bias", False))
        return LlamaSettings.from_config(config, qkv_bias=bias, output_bias=bias)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalModel`."""
        return self.lm_head(hidden)

    def kv_cache_specs(self) -> tuple[KVCacheSpec, ...]:
        """One group for each window."""
        attention = self.model.layers[0].self_attn.attention  # type: ignore[union-attr]
        windows = self.settings.windows
        return tuple(
            KVCacheSpec(
                layers=tuple(i for i, w in enumerate(windows) if w == window),
                num_kv_heads=attention.num_kv_heads,  # type: ignore[union-attr, arg-type]
                head_size=self.settings.head_size,
                dtype=str(self.dtype).removeprefix("torch."),
                window=window,
            )
            for window in sorted(set(windows))
        )


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral: every layer sees a window, where the checkpoint has one."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> LlamaSettings:
        """See `LlamaForCausalLM`."""
        windows = (int(config.get("sliding_window") or 0),) * int(require(config, "num_hidden_layers"))
        return LlamaSettings.from_config(config, qkv_bias=False, output_bias=False, windows=windows)


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, window = int(require(config, "num_hidden_layers")), int(config.get("sliding_window") or 0)
    if not config.get("use_sliding_window"):
        return (0,) * layers
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= int(config.get("max_window_layers", layers)) else "full_attention"
        for i in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 and 2.5: biases on q, k and v."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> LlamaSettings:
        """See `LlamaForCausalLM`."""
        return LlamaSettings.from_config(config, qkv_bias=True, output_bias=False, windows=_qwen_windows(config))


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3, dense: norms on the heads of q and k."""

    @classmethod
    def read_settings(cls, config: Mapping[str, Any]) -> LlamaSettings:
        """See `LlamaForCausalLM`."""
        bias = bool(config.get("attention_bias", False))
        return LlamaSettings.from_config(
            config, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_qwen_windows(config)
        )
