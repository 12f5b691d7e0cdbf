"""Would torch's own attention be faster than ours for prompts with nothing cached? Times both.

python benchmarks/torch_attention.py

Keys and values of such a step lie in the product of the merged projection, so no cache need be read: the library gets
views of [T, H + 2 K, D]. cuDNN plans every new length anew, which is why first calls are timed too.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from ceilings import seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from tuning_cases import Arena, Case, HeadShape, prefill_case

Way: TypeAlias = Callable[[], torch.Tensor]

SHAPE = HeadShape(32, 8, 128)
CASES = ((1, 8000), (4, 2048), (1, 2048), (37, 220))


def _dense(qkv: torch.Tensor, prompts: int, backend: SDPBackend) -> torch.Tensor:
    """By scaled_dot_product_attention: [T, H, D] out of [T, H + 2 K, D], all prompts of one length."""
    heads, kv_heads, _ = SHAPE
    split = qkv.unflatten(0, (prompts, -1)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(qkv: torch.Tensor, starts: torch.Tensor, most: int) -> torch.Tensor:
    """By varlen_attn, whose arguments changed from release to release."""
    from torch.nn.attention.varlen import varlen_attn

    heads, kv_heads, _ = SHAPE
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return varlen_attn(q, k, v, starts, starts, most, most, **causal, **grouped)


def _ways(case: Case, qkv: torch.Tensor, starts: torch.Tensor, prompts: int, count: int) -> dict[str, Way]:
    return {
        "ours": lambda: case.launches[0](None),
        "SDPA, flash": lambda: _dense(qkv, prompts, SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": lambda: _dense(qkv, prompts, SDPBackend.CUDNN_ATTENTION),
        "varlen_attn": lambda: _varlen(qkv, starts, count),
    }


def compare(arena: Arena) -> None:
    """Print the rate of each way, and what its first call took; of torch's, how far it is from the first that ran."""
    for prompts, count in CASES:
        case = prefill_case(arena, SHAPE, prompts, count)
        qkv = arena.normal(prompts * count, SHAPE.heads + 2 * SHAPE.kv_heads, SHAPE.size)
        starts = arena.integers([i * count for i in range(prompts + 1)])
        print(f"prefill attention, nothing cached, {case.name}:")
        first: torch.Tensor | None = None
        for name, way in _ways(case, qkv, starts, prompts, count).items():
            try:
                torch.cuda.synchronize()
                began = time.perf_counter()
                out = way().float()
                torch.cuda.synchronize()
                begun = time.perf_counter() - began
                taken = seconds(way)
            except Exception as error:  # what this torch has not, or does not take
                print(f"   {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
            line = (
                f"   {name}: {1e6 * taken:.0f} us, {case.work / taken / 1e12:.0f} TFLOP/s, first {1e3 * begun:.0f} ms"
            )
            if name != "ours":
                first = out if first is None else first
                line += f", off by {(out - first).abs().max().item():.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    compare(Arena(torch.device("cuda"), 1 << 28))
