"""The KV tensors of a rank: how many blocks fit, and one pair of tensors a layer.

Shapes: N blocks, S block size, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.api.config import EngineConfig, KVCacheSpec
from workers.api.errors import ConfigError, OutOfMemory
from workers.context import LayerCache
from workers.execution.memory import readable


def block_bytes(specs: Sequence[KVCacheSpec], block_size: int) -> int:
    """Bytes of one block over all layers, on one rank."""
    return sum(spec.block_bytes(block_size) for spec in specs)


def count_blocks(specs: Sequence[KVCacheSpec], engine: EngineConfig, max_model_len: int, available: int) -> int:
    """How many blocks fit in `available` bytes.

    Raises OutOfMemory, saying what would fit, where not even one sequence of max_model_len tokens does.
    """
    size = block_bytes(specs, engine.block_size)
    blocks = max(0, available) // size
    needed = -(-max_model_len // engine.block_size)
    if blocks < needed:
        raise OutOfMemory(
            f"the KV cache has room for {blocks * engine.block_size} tokens in {readable(max(0, available))}, one "
            f"sequence of max_model_len = {max_model_len} needs {readable(needed * size)}: set max_model_len to at "
            f"most {blocks * engine.block_size}, or give the cache more memory"
        )
    return blocks


def allocate(specs: Sequence[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> list[LayerCache]:
    """Keys and values [N, S, K, D] for each layer, not initialized; in one piece for layers that share a spec.

    Raises OutOfMemory.
    """
    layers: dict[int, LayerCache] = {}
    for spec in specs:
        if spec.latent_size or spec.scale_bytes:
            raise ConfigError("latent and quantized KV caches are not supported yet")
        shape = (2, len(spec.layers), num_blocks, block_size, spec.num_kv_heads, spec.head_size)
        try:
            keys, values = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            total = readable(num_blocks * block_bytes(specs, block_size))
            raise OutOfMemory(
                f"{num_blocks} KV blocks take {total}, which cannot be allocated on {device}; {len(layers)} of "
                f"{sum(len(s.layers) for s in specs)} layers did fit"
            ) from e
        layers |= {layer: LayerCache(keys[i], values[i]) for i, layer in enumerate(spec.layers)}
    if sorted(layers) != list(range(len(layers))):
        raise ConfigError(f"the model's cache specs name layers {sorted(layers)}, not 0 to {len(layers) - 1}")
    return [layers[i] for i in range(len(layers))]


class BlockCopies:
    """Copies blocks of `caches` to other ones, in all layers; those in one piece of memory take one copy."""

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        pieces: dict[int, torch.Tensor] = {}
        for tensor in (t for cache in caches for t in (cache.key, cache.value)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in pieces:
                whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
                pieces[storage.data_ptr()] = whole.view(-1, *tensor.shape)  # [tensors in this piece, N, S, K, D]
        self._pieces = list(pieces.values())

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Each (from, to), in this order. On CUDA it is queued on the current stream, and takes no memory."""
        for source, target in pairs:
            for piece in self._pieces:
                piece[:, target].copy_(piece[:, source])
