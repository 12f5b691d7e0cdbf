"""`PytorchEngineConfig` and `TurbomindEngineConfig`: LMDeploy's fields, each with its counterpart in our config.

What is not done yet is refused by name when a config is used. What has no meaning here is accepted, and warned of once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from cluster.pipeline.notices import without_effect
from workers.api.config import EVICTION_TYPES
from workers.api.errors import ConfigError

Sections = tuple[dict[str, Any], dict[str, Any]]  # of a cluster file: model, engine


@dataclass
class PytorchEngineConfig:
    """Limits of an engine, by the names of LMDeploy's PyTorch engine.

    `session_len` is the longest context in tokens (None: the model's own), `cache_max_entry_count` the part of the free
    GPU memory that the KV cache takes, or, over 1, the number of its blocks; `max_prefill_token_num` counts the query
    tokens of a step. `num_gpu_blocks` is the number of blocks (0: from memory; on a CPU too).
    """

    model_name: str = ""
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int = 128
    cache_max_entry_count: float = 0.8
    eviction_type: str = "recompute"
    prefill_interval: int = 16
    block_size: int = 64
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    adapters: dict[str, str] | None = None
    max_prefill_token_num: int = 4096
    thread_safe: bool = False
    enable_prefix_caching: bool = False
    download_dir: str | None = None
    revision: str | None = None

    def sections(self) -> Sections:
        """What a cluster file would say. Raises ConfigError for what is not done yet."""
        if self.adapters:
            raise ConfigError("adapters: LoRA adapters are not done yet")
        _warn_unless_default(self, "thread_safe", "a pipeline may always be called from several threads")
        _warn_unless_default(self, "prefill_interval", "prompts run in chunks beside running sequences")
        _warn_of_model_name(self.model_name)
        engine = _engine(self, self.block_size, self.max_prefill_token_num)
        if self.num_gpu_blocks:
            engine["num_blocks"] = self.num_gpu_blocks
        return _model(self), engine | _eviction(self.eviction_type, self.num_cpu_blocks)


@dataclass
class TurbomindEngineConfig:
    """The same by the names of LMDeploy's TurboMind engine.

    `rope_scaling_factor` (0: off) is dynamic NTK's: the context may be up to so many times the trained one.
    `num_tokens_per_iter` (0: `max_prefill_token_num`) counts query tokens of a step.
    """

    model_name: str | None = None
    model_format: str | None = None
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int = 128
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int = 8192
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1

    def sections(self) -> Sections:
        """What a cluster file would say. Raises ConfigError for what is not done yet."""
        refuse_quantization(self.model_format, self.quant_policy)
        if self.use_logn_attn:
            raise ConfigError("use_logn_attn: LogN attention is not done yet")
        _warn_unless_default(self, "max_prefill_iters", "num_tokens_per_iter alone says how long prompts are cut")
        _warn_of_model_name(self.model_name)
        engine = _engine(self, self.cache_block_seq_len, self.num_tokens_per_iter or self.max_prefill_token_num)
        model = _model(self)
        if self.rope_scaling_factor == 1.0:  # what TurboMind's documents say to switch it on
            without_effect("rope_scaling_factor=1.0", "a context beyond the trained one needs a factor over 1")
        elif self.rope_scaling_factor:
            model["rope_scaling_factor"] = self.rope_scaling_factor
        return model, engine


BackendConfig = PytorchEngineConfig | TurbomindEngineConfig


def refuse_quantization(model_format: str | None, quant_policy: int) -> None:
    """Raises ConfigError for formats of weights and KV caches that are not done yet."""
    if quant_policy not in (0, 4, 8):
        raise ConfigError(f"quant_policy must be 0, 4 or 8, got {quant_policy}")
    if quant_policy:
        raise ConfigError(f"quant_policy={quant_policy}: a quantized KV cache is not done yet")
    if model_format == "awq":
        raise ConfigError("model_format='awq': quantized weights are not done yet")
    if model_format not in (None, "", "hf"):
        raise ConfigError(f"model_format={model_format!r}: only Hugging Face's layout is read (hf)")


def _model(config: BackendConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"tensor_parallel": config.tp}
    if config.session_len is not None:
        found["max_model_len"] = config.session_len
    if config.revision is not None:
        found["revision"] = config.revision
    return found


def _engine(config: BackendConfig, block_size: int, tokens: int) -> dict[str, Any]:
    share = config.cache_max_entry_count
    found: dict[str, Any] = {
        "max_num_seqs": config.max_batch_size,
        "block_size": block_size,
        "max_num_batched_tokens": max(tokens, config.max_batch_size),
        "prefix_caching": config.enable_prefix_caching,
    }
    if share > 1:
        found["num_blocks"] = int(share)
    else:
        found["cache_fraction"] = share
    return found


def _eviction(kind: str, blocks: int) -> dict[str, Any]:
    if kind not in EVICTION_TYPES:
        raise ConfigError(f"eviction_type must be 'recompute' or 'copy', got {kind!r}")
    if kind == "copy":  # blocks are known by their prefixes, so prefixes are cached
        return {"eviction_type": kind, "prefix_caching": True, **({"num_cpu_blocks": blocks} if blocks else {})}
    if blocks:
        without_effect("num_cpu_blocks", "evicted sequences are recomputed unless eviction_type='copy'")
    return {}


def _warn_of_model_name(name: str | None) -> None:
    if name:
        without_effect("model_name in an engine config", "the checkpoint says which model it is")


def _warn_unless_default(config: BackendConfig, name: str, why: str) -> None:
    default = next(f.default for f in fields(config) if f.name == name)
    if getattr(config, name) != default:
        without_effect(name, why)
