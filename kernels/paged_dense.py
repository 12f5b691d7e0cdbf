"""Attention over the paged cache in torch: what the references of `paged_prefill` and `paged_decode` share.

The queries are cut into pieces, the pieces sorted by how much they see and taken in tiles. The keys of a tile are
gathered into one dense matrix, aligned at their ends, so that the causal mask is the same for all its pieces.

Shapes: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head size, N blocks, S block size, P pieces of a
tile, Q queries of a piece and L positions that it sees, both after padding at the front.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
import torch.nn.functional as F

from kernels.attention_tile import PLAIN, ScoreOptions
from kernels.kv_cache import Memo

_QUERIES = 64  # of a piece: fewer gather the keys more often, more compute what the causal mask then hides
_ELEMENTS = 1 << 18  # of a tile's keys: more leaves the cache, fewer cost more calls


@dataclass(frozen=True, slots=True)
class Tile:
    """Pieces that are attended to together, on the device.

    tokens: the P * Q query tokens, padding included. slots [P * L] int32: where their keys are. bias fp32, broadcast to
    [P, K, Q * G, L], 0 or -inf; None: all see all. real [n] int64: which of the P * Q are not padding; None: all.
    """

    pieces: int
    queries: int
    tokens: torch.Tensor | slice
    slots: torch.Tensor
    bias: torch.Tensor | None
    real: torch.Tensor | None


# A piece: the power of two that bounds its queries, positions seen, first token, queries, last position + 1, sequence.
_Piece: TypeAlias = tuple[int, int, int, int, int, int]


def make_tiles(
    block_tables: torch.Tensor,
    cu_query: Sequence[int],
    kv_lens: Sequence[int],
    *,
    block_size: int,
    kv_channels: int,
    group: int,
    window: int,
) -> list[Tile]:
    """The tiles of a batch; arguments as in `paged_prefill`, lengths on the host, `kv_channels` is K * D.

    A sequence without queries or without keys is in none.
    """
    pieces: list[_Piece] = []
    for b, kv_len in enumerate(kv_lens):
        start, stop = cu_query[b], cu_query[b + 1]
        for first in range(start, stop if kv_len else start, _QUERIES):
            count = min(_QUERIES, stop - first)
            end = kv_len - stop + first + count
            seen = min(end, window + count - 1) if window else end
            # All short ones are alike: there a call costs more than padding.
            pieces.append((max(3, (count - 1).bit_length()) if count > 1 else 0, seen, first, count, end, b))
    if not pieces:
        return []
    pieces.sort()
    device = block_tables.device
    slots = block_tables.unsqueeze(2) * block_size + torch.arange(block_size, dtype=torch.int32, device=device)
    slots = slots.flatten(1)
    # Through a buffer, since torch.tensor looks at every element of a list for long.
    columns = torch.frombuffer(array("q", chain.from_iterable(pieces)), dtype=torch.int64).to(device)
    columns = columns.view(len(pieces), -1).t().unsqueeze(2)
    return [_tile(slots, pieces[i:j], columns[:, i:j], group, window) for i, j in _bounds(pieces, kv_channels)]


def _bounds(pieces: list[_Piece], kv_channels: int) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end: pieces of one width and not too many keys."""
    begin = 0
    for i, (width, seen, *_) in enumerate(pieces):
        if i > begin and (width != pieces[begin][0] or (i + 1 - begin) * seen * kv_channels > _ELEMENTS):
            yield begin, i
            begin = i
    yield begin, len(pieces)


def _tile(slots: torch.Tensor, part: list[_Piece], columns: torch.Tensor, group: int, window: int) -> Tile:
    """slots [B, M * S] int32; columns: what `part` holds, each [P, 1]."""
    device = slots.device
    _, seen, first, count, end, row = columns.unbind(0)
    span, queries = part[-1][1], max(piece[3] for piece in part)
    at = torch.arange(-span, 0, device=device) + end
    padded = part[0][1] < span
    if padded:
        at = torch.maximum(at, end - seen)  # what is not seen may be NaN, which no mask removes
    hidden = None
    if queries > 1:
        key, query = torch.arange(span, device=device), torch.arange(queries, device=device).unsqueeze(1)
        lead = key - (span - queries) - query  # how far the key is ahead of the query
        hidden = (lead > 0) | (lead <= -window) if window else lead > 0
        hidden = hidden.repeat_interleave(group, dim=0)
    if padded:
        missing = (torch.arange(span, device=device) < span - seen).unsqueeze(1)
        hidden = missing if hidden is None else missing | hidden
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
        bias = bias.view(-1, 1, *bias.shape[-2:])
    even = all(piece[3] == queries for piece in part)
    step = torch.arange(-queries, 0, device=device) + count
    tokens: torch.Tensor | slice = (first + step.clamp(min=0)).flatten()
    begin = part[0][2]
    if even and all(piece[2] == begin + i * queries for i, piece in enumerate(part)):
        tokens = slice(begin, begin + len(part) * queries)  # of q it needs no copy
    slots = slots.index_select(0, row.flatten()).gather(1, at)
    real = None if even else (step >= 0).flatten().nonzero().flatten()
    return Tile(len(part), queries, tokens, slots.flatten(), bias, real)


def attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query: torch.Tensor | None,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor | None,
    memo: Memo | None,
    options: ScoreOptions = PLAIN,
) -> torch.Tensor:
    """`paged_prefill` in torch, computed in fp32; cu_query None: one query a sequence. On CUDA it waits for the device.

    The output is zeros where a sequence has no keys, and for tokens behind all sequences; those before the first are
    left alone.
    """
    _, block_size, kv_heads, size = key_cache.shape
    memo = {} if memo is None else memo
    if window not in memo:
        starts = range(len(q) + 1) if cu_query is None else cu_query.tolist()
        tiles = make_tiles(
            block_tables,
            starts,
            kv_lens.tolist(),
            block_size=block_size,
            kv_channels=kv_heads * size,
            group=q.shape[1] // kv_heads,
            window=window,
        )
        memo[window] = starts[0], tiles
    first, tiles = memo[window]
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[first:].zero_()
    caches = [cache.view(-1, kv_heads, size) for cache in (key_cache, value_cache)]
    for tile in tiles:
        _attend(q, caches, tile, scale, out, options)
    return out


def _attend_with(
    options: ScoreOptions, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, t: Tile, scale: float
) -> torch.Tensor:
    """Attention whose scores are changed: rows [P, K, Q * G, D], keys and values [P, K, L, D] -> as rows."""
    _, kv_heads, count, _ = rows.shape
    span = keys.shape[2]
    scores = rows @ keys.transpose(2, 3) * scale
    if options.soft_cap:
        scores = torch.tanh(scores / options.soft_cap) * options.soft_cap
    if options.slopes is not None:
        key, query = torch.arange(span, device=rows.device), torch.arange(t.queries, device=rows.device)
        lead = (key - (span - t.queries) - query.unsqueeze(1)).float()
        slopes = options.slopes.view(kv_heads, 1, -1, 1) * lead.view(1, t.queries, 1, span)
        scores += slopes.reshape(kv_heads, count, span)
    if t.bias is not None:
        scores += t.bias
    if options.sinks is not None:
        sinks = options.sinks.view(kv_heads, 1, -1).expand(kv_heads, t.queries, -1).reshape(1, kv_heads, count, 1)
        scores = torch.cat([scores, sinks.expand(len(scores), -1, -1, -1)], dim=-1)
    return scores.softmax(dim=-1)[..., :span] @ values


def _attend(
    q: torch.Tensor, caches: list[torch.Tensor], t: Tile, scale: float, out: torch.Tensor, options: ScoreOptions
) -> None:
    """Write the tokens of one tile; caches [N * S, K, D]."""
    _, kv_heads, size = caches[0].shape
    keys, values = (
        c.index_select(0, t.slots).view(t.pieces, -1, kv_heads, size).transpose(1, 2).float() for c in caches
    )
    part = q[t.tokens] if isinstance(t.tokens, slice) else q.index_select(0, t.tokens)
    # The heads of a group are rows beside each other, so no key is repeated.
    rows = part.view(t.pieces, t.queries, kv_heads, -1, size).transpose(1, 2).float()
    rows = rows.reshape(t.pieces, kv_heads, -1, size)
    if options.is_plain:
        result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=t.bias, scale=scale)
    else:
        result = _attend_with(options, rows, keys, values, t, scale)
    result = result.view(t.pieces, kv_heads, t.queries, -1, size).transpose(1, 2).reshape(part.shape).to(out.dtype)
    if isinstance(t.tokens, slice):
        out[t.tokens] = result
    elif t.real is None:
        out.index_copy_(0, t.tokens, result)
    else:
        out.index_copy_(0, t.tokens[t.real], result[t.real])
