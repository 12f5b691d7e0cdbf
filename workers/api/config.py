"""What a replica is told at its start. Frozen; derived values get types of their own."""

from __future__ import annotations

from dataclasses import dataclass

from workers.api.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("auto", "native", "transformers")
EVICTION_TYPES = ("recompute", "copy")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint, and how it is loaded.

    `path` is a local folder in the Hugging Face layout (hub ids are resolved to one before this is made).
    `load_format`: "safetensors" streams the files; "dummy" makes seeded weights on the device.
    `dtype`: "auto" is the checkpoint's on a GPU and float32 on the CPU.
    `implementation`: "native", "transformers" (its own modules, rewritten by the patch map), or "auto": native where
    there is one. `model_files` are Python files that register models or rewrites; every rank imports them.
    `rope_scaling_factor`: rotations are scaled (dynamic NTK) for contexts of up to so many times the trained length.
    `trust_remote_code`: code that lies in the checkpoint's folder may be run, where there is no native model.
    """

    path: str
    name: str
    dtype: str = "auto"
    load_format: str = "safetensors"
    max_model_len: int | None = None  # tokens; None = the checkpoint's own
    seed: int = 0
    implementation: str = "auto"
    model_files: tuple[str, ...] = ()
    trust_remote_code: bool = False
    rope_scaling_factor: float | None = None

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation {self.implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"dtype {self.dtype!r} is not one of auto, {', '.join(DTYPES)}")
        if self.load_format not in ("safetensors", "dummy"):
            raise ConfigError(f"load_format {self.load_format!r} is not one of safetensors, dummy")
        if self.rope_scaling_factor is not None and not 1.0 < self.rope_scaling_factor <= 1024.0:
            raise ConfigError(f"rope_scaling_factor must be over 1 and at most 1024, got {self.rope_scaling_factor}")

    @property
    def trusted_folder(self) -> str | None:
        """The folder whose code may be run, if any."""
        return self.path if self.trust_remote_code else None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Tokens and blocks, not bytes, but for the two memory settings."""

    block_size: int = 16  # tokens a block
    max_num_seqs: int = 128  # sequences with a slot
    max_num_batched_tokens: int = 2048  # query tokens a step
    num_blocks: int | None = None  # None = from memory
    cache_fraction: float = 0.8  # of the device memory that is free after loading (GPU)
    cache_bytes_cpu: int = 256 << 20  # KV cache on the CPU
    prefix_caching: bool = True
    step_ahead: bool = True  # plan step N+1 while N runs
    cuda_graphs: bool = True  # on a GPU: capture steps at the start, replay them
    batch_invariant: bool = False  # on a GPU: a token's logits do not depend, not in a bit, on what runs beside it
    eviction_type: str = "recompute"  # copy: cached blocks that others need are swapped to host memory, and back
    num_cpu_blocks: int | None = None  # of it, on each rank; None = from swap_space
    swap_space: int = 4 << 30  # bytes of host memory on each rank, page-locked on a GPU

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}")
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or a full batch could not decode"
            )
        if not 0.0 < self.cache_fraction <= 1.0:
            raise ConfigError(f"cache_fraction must be in (0, 1], got {self.cache_fraction}")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"num_blocks must be at least 1, got {self.num_blocks}")
        if self.eviction_type not in EVICTION_TYPES:
            raise ConfigError(f"eviction_type {self.eviction_type!r} is not one of {', '.join(EVICTION_TYPES)}")
        if self.eviction_type == "copy" and not self.prefix_caching:
            raise ConfigError("eviction_type copy needs prefix_caching: blocks are known by their prefixes")
        if self.num_cpu_blocks is not None and self.num_cpu_blocks < 1:
            raise ConfigError(f"num_cpu_blocks must be at least 1, got {self.num_cpu_blocks}")
        if self.swap_space < 1:
            raise ConfigError(f"swap_space must be at least one byte, got {self.swap_space}")


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The KV cache of a group of layers that share a shape; block bytes follow from it."""

    layers: tuple[int, ...]
    num_kv_heads: int  # on one rank
    head_size: int
    dtype: str
    window: int = 0  # sliding window in tokens; 0 = full attention
    latent_size: int = 0  # latent attention stores one vector of this size instead of K and V; 0 = K and V
    scale_bytes: int = 0  # bytes of quantization scales a token, head and layer

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block over all layers of the group, on one rank."""
        if self.latent_size:
            per_token = self.latent_size * DTYPE_BYTES[self.dtype] + self.scale_bytes
        else:
            per_token = 2 * self.num_kv_heads * (self.head_size * DTYPE_BYTES[self.dtype] + self.scale_bytes)
        return per_token * block_size * len(self.layers)


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """All that the ranks of one replica need to start."""

    model: ModelConfig
    engine: EngineConfig
    tensor_parallel: int = 1
    device: str = "auto"  # auto | cpu | cuda
    step_timeout: float = 10.0  # seconds: a rank that is silent, or in one step, for longer ends the replica
    start_timeout: float = 600.0  # seconds: a rank whose start stands still for longer ends the replica
    log_level: str = "info"  # debug | info | warning | error
    log_format: str = "text"  # text | json

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {self.device!r} is not one of auto, cpu, cuda")
        if self.step_timeout <= 0:
            raise ConfigError(f"step_timeout must be positive, got {self.step_timeout}")
        if self.start_timeout <= 0:
            raise ConfigError(f"start_timeout must be positive, got {self.start_timeout}")
