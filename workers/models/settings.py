"""`DecoderSettings`: the numbers of a decoder, read from a config.json. Families say what is theirs by the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from workers.api.errors import ConfigError
from workers.layers.linear import QKVLayout
from workers.layers.moe import Choice
from workers.layers.rotary import RopeSettings
from workers.models.base import require

BlockKind: TypeAlias = Literal["sequential", "sandwich", "post_norm", "parallel", "parallel_norms"]


@dataclass(frozen=True, slots=True)
class MoESettings:
    """`intermediate`: channels inside an expert. `shared`: those of the experts that every token goes to, together.

    `layers`: which layers have experts; the others have one feed-forward layer.
    """

    choice: Choice
    intermediate: int
    layers: tuple[bool, ...]
    shared: int = 0
    shared_gate: bool = False  # what the shared experts add is weighed by a sigmoid
    correction: bool = False  # the router has a correction for the choice


@dataclass(frozen=True, slots=True)
class LatentSettings:
    """Of latent attention: ranks of the compressed queries (0: not compressed) and of keys with values; channels of a
    head's key that are rotated and that are not, and of its value.
    """

    query_rank: int
    rank: int
    rotated: int
    plain: int
    value: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSettings:
    """Sizes in channels. What has an entry a layer is a tuple; the defaults are Llama's."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    windows: tuple[int, ...]  # 0: the layer sees everything
    tied: bool = False

    rope: RopeSettings | None  # None: nothing is rotated
    ropes: tuple[RopeSettings | None, ...] | None = None  # where layers differ
    interleaved: bool = False  # neighbours are rotated against each other, not halves

    block: BlockKind = "sequential"
    norm: Literal["rms", "offset_rms", "layer", "layer_without_bias"] = "rms"
    qk_norm: Literal["", "head", "width", "each_head"] = ""  # one for all heads, over all heads together, one for each
    qkv_layout: QKVLayout = "separate"
    qkv_bias: bool = False
    qkv_clip: float = 0.0  # q, k and v are clamped to +- this
    output_bias: bool = False
    latent: LatentSettings | None = None
    scale: float = 0.0  # of scores; 0: head_size ** -0.5
    soft_cap: float = 0.0  # of scores
    alibi: float = 0.0  # what the slopes are multiplied by
    sinks: bool = False
    logn: int = 0  # tokens: queries beyond grow with the logarithm of their position (Su, 2021)

    activation: str = "silu"
    gated: bool = True
    gate_up_fused: bool = False  # in the checkpoint
    moe: MoESettings | None = None
    mlp_bias: bool = False

    head_bias: bool = False
    head_normalized: bool = False  # rows of length one
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0

    @staticmethod
    def from_config(config: Mapping[str, Any], **changes: Any) -> DecoderSettings:
        """From a config.json with the usual keys; `changes` are fields that the family knows better.

        Raises ConfigError where a key is missing or what it asks for is not supported.
        """
        if config.get("quantization_config"):
            raise ConfigError("the checkpoint is quantized; that is not supported yet")

        def given(field: str, key: str) -> int:
            return int(changes[field] if field in changes else require(config, key))

        hidden, heads = given("hidden", "hidden_size"), given("heads", "num_attention_heads")
        layers = given("layers", "num_hidden_layers")
        values: dict[str, Any] = {
            "vocab_size": given("vocab_size", "vocab_size"),
            "hidden": hidden,
            "intermediate": given("intermediate", "intermediate_size"),
            "layers": layers,
            "heads": heads,
            "kv_heads": int(config.get("num_key_value_heads") or heads),
            "head_size": int(config.get("head_dim") or hidden // heads),
            "eps": float(config.get("rms_norm_eps", 1e-6)),
            "windows": (0,) * layers,
            "tied": bool(config.get("tie_word_embeddings", False)),
            "activation": str(config.get("hidden_act", "silu")),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            **changes,
        }
        if "rope" not in values:
            values["rope"] = RopeSettings.from_config(config)
        return DecoderSettings(**values)

    def rope_of(self, layer: int) -> RopeSettings | None:
        """The rope of one layer."""
        return self.rope if self.ropes is None else self.ropes[layer]


def same_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`sliding_window` for every layer, where the checkpoint has one."""
    return (int(config.get("sliding_window") or 0),) * int(require(config, "num_hidden_layers"))


def typed_windows(config: Mapping[str, Any], default: str | list[str] = "full_attention") -> tuple[int, ...]:
    """`sliding_window` for the layers that `layer_types` calls so; `default` are the types where it is missing."""
    layers, window = int(require(config, "num_hidden_layers")), int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or ([default] * layers if isinstance(default, str) else default)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
