"""Trying one rewritten module by itself: its inputs from transformers, a step around it, tensors in our layout.

Shapes: B sequences, L tokens of the longest, T tokens of all, K KV heads, D head size, S block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kernels.kv_cache import store_kv
from workers.api.errors import ConfigError
from workers.context import AttentionMetadata, DecodeBatch, ForwardContext, LayerCache, PrefillBatch
from workers.layers.attention import Attention
from workers.models.paged import CHILD
from workers.models.step_context import StepContext


class ModuleIOExtractor:
    """What `module` takes and gives back while `model`, of transformers, runs."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self._model, self._module = model, module

    def extract(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
        """input_ids [B, L] -> positional arguments, keyword arguments and output of the module's first call.

        Raises ConfigError where the model does not call it.
        """
        calls: list[tuple[Any, Any, Any]] = []

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((args, dict(kwargs), output))

        hook = self._module.register_forward_hook(note, with_kwargs=True)
        try:
            with torch.inference_mode():
                self._model(input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            hook.remove()
        if not calls:
            raise ConfigError(f"the model does not call the {type(self._module).__name__} it was asked to watch")
        return calls[0]


def continuous_tensor(tensor: torch.Tensor, seq_length: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """tensor [B, L, ...] -> [1, T, ...]: of each sequence its first `seq_length` rows, without the padding."""
    return torch.cat([row[: int(n)] for row, n in zip(tensor, seq_length, strict=True)]).unsqueeze(0)


def make_step_context(
    input_ids: torch.Tensor,
    seq_length: torch.Tensor | Sequence[int] | None = None,
    history_length: torch.Tensor | Sequence[int] | None = None,
    past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    num_key_value_heads: int,
    head_size: int,
    kv_cache_dtype: torch.dtype = torch.float32,
    num_layers: int = 1,
    block_size: int = 16,
    world_size: int = 1,
) -> StepContext:
    """A step of input_ids [B, L], of which `seq_length` [B] are real (all, unless said), after `history_length` [B].

    `past_key_values`: a layer's keys and values [B, K, L', D] of the history, which are put in its cache. What is not
    written of the cache is NaN.
    """
    device, (count, longest) = input_ids.device, input_ids.shape
    lengths = _ints(seq_length, [longest] * count)
    history = _ints(history_length, [0] * count)
    known = [a + b for a, b in zip(lengths, history, strict=True)]
    width = -(-max(known) // block_size)
    tables = torch.arange(count * width, dtype=torch.int32, device=device).view(count, width)
    shape = (count * width, block_size, num_key_value_heads, head_size)
    caches = [LayerCache(*(torch.full(shape, torch.nan, dtype=kv_cache_dtype, device=device) for _ in range(2)))
              for _ in range(num_layers)]  # fmt: skip

    def places(sequence: int, start: int, end: int) -> torch.Tensor:
        at = torch.arange(start, end, device=device)
        return tables[sequence].long()[at // block_size] * block_size + at % block_size

    for cache, (keys, values) in zip(caches, past_key_values or (), strict=False):
        for n, past in enumerate(history):
            k, v = (t[n, :, :past].transpose(0, 1).to(kv_cache_dtype).contiguous() for t in (keys, values))
            store_kv(k, v, cache.key, cache.value, places(n, 0, past), {})
    slots = torch.cat([places(n, history[n], known[n]) for n in range(count)])
    kv_lens = torch.tensor(known, dtype=torch.int32, device=device)
    if all(n == 1 for n in lengths):
        metadata = AttentionMetadata(slots, count, DecodeBatch(tables, kv_lens, max(known)), None)
    else:
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        metadata = AttentionMetadata(slots, 0, None, PrefillBatch(tables, kv_lens, ends, max(lengths), max(known), 0))
    positions = torch.cat([torch.arange(history[n], known[n], device=device) for n in range(count)])
    context = ForwardContext((metadata,) * num_layers, caches)
    return StepContext(continuous_tensor(input_ids, lengths)[0], positions, context, world_size=world_size)


def page_attention(
    module: nn.Module, *, num_heads: int, num_key_value_heads: int, head_size: int, scale: float
) -> None:
    """Give a transformers attention module what loading a whole model gives it: its `Attention` over the cache."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    module.add_module(CHILD, Attention(layer, num_heads, num_key_value_heads, head_size, scale=scale))


def _ints(given: torch.Tensor | Sequence[int] | None, otherwise: list[int]) -> list[int]:
    return otherwise if given is None else [int(n) for n in given]
