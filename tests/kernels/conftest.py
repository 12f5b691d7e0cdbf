"""Paged batches with poison wherever nothing may be read, and the dense attention that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True, slots=True)
class PagedCase:
    """A batch of sequences in a paged cache, and the dense keys and values [kv_len, K, D] it was made of."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    cu_query: torch.Tensor
    kv_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    window: int
    scale: float

    @property
    def max_query(self) -> int:
        return int(self.cu_query.diff().max())

    @property
    def max_kv(self) -> int:
        return int(self.kv_lens.max())

    def expected(self) -> torch.Tensor:
        """Dense attention of each sequence in fp64, by torch's own scaled_dot_product_attention."""
        out = torch.zeros_like(self.q)
        bounds = self.cu_query.tolist()
        for b, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            q = self.q[bounds[b] : bounds[b + 1]].double()
            if not (len(keys) and len(q)):
                continue
            at = torch.arange(len(keys) - len(q), len(keys), device=q.device)[:, None]
            position = torch.arange(len(keys), device=q.device)
            mask = (position <= at) & ((position > at - self.window) if self.window else torch.tensor(True))
            group = q.shape[1] // keys.shape[1]
            dense = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1),
                keys.double().repeat_interleave(group, dim=1).transpose(0, 1),
                values.double().repeat_interleave(group, dim=1).transpose(0, 1),
                attn_mask=mask,
                scale=self.scale,
            )
            out[bounds[b] : bounds[b + 1]] = dense.transpose(0, 1).to(out.dtype)
        return out


MakeCase = Callable[..., PagedCase]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def make_case(device: torch.device) -> MakeCase:
    def make(
        lengths: list[tuple[int, int]],
        heads: int = 4,
        kv_heads: int = 2,
        size: int = 32,
        block: int = 16,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> PagedCase:
        """`lengths` holds (query tokens, kv_len) of each sequence."""
        random = torch.Generator().manual_seed(seed)
        needed = [-(-kv // block) for _, kv in lengths]
        spare = 3
        free = torch.randperm(sum(needed) + spare, generator=random).tolist()
        shape = (len(free), block, kv_heads, size)
        key_cache, value_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        tables = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
        keys, values = [], []
        for b, (queries, kv) in enumerate(lengths):
            k, v = (torch.randn(kv, kv_heads, size, generator=random).to(dtype) for _ in range(2))
            keys.append(k.to(device))
            values.append(v.to(device))
            # What no query's window reaches may have been given away: neither table entry nor content counts.
            lowest = max(0, kv - queries - window + 1) if window else 0
            for i in range(needed[b]):
                page = free.pop()
                if (i + 1) * block <= lowest:
                    continue
                tables[b, i] = page
                first, last = max(i * block, lowest), min((i + 1) * block, kv)
                key_cache[page, first - i * block : last - i * block] = k[first:last].float()
                value_cache[page, first - i * block : last - i * block] = v[first:last].float()
        cu_query = torch.tensor([0] + [queries for queries, _ in lengths]).cumsum(0).int()
        q = torch.randn(int(cu_query[-1]), heads, size, generator=random)
        return PagedCase(
            q.to(device, dtype),
            key_cache.to(device, dtype),
            value_cache.to(device, dtype),
            tables.to(device),
            cu_query.to(device),
            torch.tensor([kv for _, kv in lengths], dtype=torch.int32, device=device),
            keys,
            values,
            window,
            size**-0.5,
        )

    return make
