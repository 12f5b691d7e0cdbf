"""Which experts tokens go to: chosen by their logits, and the tokens' choices put in order of the experts.

Shapes: T tokens, K experts a token, E experts, M = T * K entries.
Sources: Jiang et al., Mixtral of Experts, 2024; DeepSeek-V2 and V3, 2024 (groups, corrections).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import (
    begin,
    constexpr,
    early_start,
    next_power_of_two,
    tensor,
    tl,
    triton_jit,
    triton_jit_for_any,
    use_triton,
)

_MOST_COUNTED = 8192  # entries: beyond, sorting is faster than counting who is before whom
_QUERIES, _KEYS = 32, 256


@dataclass(frozen=True, slots=True)
class Routing:
    """order [M] int64: entries (token * K + choice) by expert; starts [E + 1] int32: where each expert's begin."""

    order: torch.Tensor
    starts: torch.Tensor
    choices: int


def route_reference(experts: torch.Tensor, count: int) -> Routing:
    """`route` in torch."""
    by_expert, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(count + 1, dtype=by_expert.dtype, device=experts.device)
    return Routing(order, torch.searchsorted(by_expert, bounds, out_int32=True), experts.shape[1])


@triton_jit_for_any(numbers=["entries"])
def _route_kernel(
    expert_ptr: tensor,
    order_ptr: tensor,
    start_ptr: tensor,
    entries: tensor,
    EXPERTS: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_M: constexpr,
    EARLY: constexpr,
) -> None:
    """The places of some entries, then of the experts' first ones, a program.

    An entry's key is its expert * M + its number, no two are equal: its place is how many are less.
    """
    begin(EARLY)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < entries
    expert = tl.load(expert_ptr + query, mask=real, other=0).to(tl.int32)
    key = tl.where(real, expert * entries + query, (query - entries) * entries)
    place = tl.zeros([BLOCK_Q], tl.int32)
    for first in tl.range(0, entries, BLOCK_M):
        other = first + tl.arange(0, BLOCK_M)
        others = tl.load(expert_ptr + other, mask=other < entries, other=EXPERTS).to(tl.int32)
        less = (others * entries + other)[None, :] < key[:, None]
        place += tl.sum(less.to(tl.int32), axis=1)
    tl.store(order_ptr + place, query.to(tl.int64), mask=real)
    tl.store(start_ptr + query - entries, place, mask=(query >= entries) & (query <= entries + EXPERTS))


def _launch_route(experts: torch.Tensor, count: int) -> Routing:
    entries, device = experts.numel(), experts.device
    order = torch.empty(entries, dtype=torch.int64, device=device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=device)
    _route_kernel[(-(-(entries + count + 1) // _QUERIES),)](
        *(experts, order, starts, entries, count, _QUERIES, _KEYS), num_warps=4, **early_start(experts)
    )
    return Routing(order, starts, experts.shape[1])


def route(experts: torch.Tensor, count: int) -> Routing:
    """The routing of `experts` [T, K] int64, the experts of each token, out of `count`. It does not wait for the
    device. Of an expert the entries stay in order.
    """
    if use_triton(experts) and experts.numel() <= _MOST_COUNTED:
        return _launch_route(experts, count)
    return route_reference(experts, count)


def choose_reference(
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    top_k: int,
    *,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    groups: tuple[int, int, int] = (1, 1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose` in torch."""
    scores = logits.float()
    scores = scores.sigmoid() if sigmoid else scores.softmax(dim=-1)
    ranked = scores if correction is None else scores + correction
    count, kept_groups, group_top = groups
    if count > 1:
        by_group = ranked.unflatten(1, (count, -1))
        worth = by_group.topk(group_top, dim=-1).values.sum(dim=-1)
        best = worth.topk(kept_groups, dim=-1, sorted=False).indices
        kept = torch.zeros_like(worth).scatter_(1, best, 1.0).unsqueeze(-1) > 0
        ranked = by_group.masked_fill(~kept, 0.0 if correction is None else -torch.inf).flatten(1)
    experts = ranked.topk(top_k, dim=-1, sorted=False).indices
    shares = scores.gather(1, experts)
    if normalize:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return experts, shares * scale if scale != 1.0 else shares


@triton_jit
def _choose_kernel(
    logits_ptr: tensor,
    correction_ptr: tensor,
    expert_ptr: tensor,
    share_ptr: tensor,
    logits_row: tensor,
    scale: tensor,
    EXPERTS: constexpr,
    TOP_K: constexpr,
    SIGMOID: constexpr,
    NORMALIZE: constexpr,
    BLOCK_E: constexpr,
    BLOCK_K: constexpr,
    EARLY: constexpr,
) -> None:
    """One token a program: its best experts, one after the other."""
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_E)
    real = index < EXPERTS
    logits = tl.load(logits_ptr + token * logits_row + index, mask=real, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        raised = tl.exp(logits - tl.max(logits, axis=0))
        scores = raised / tl.sum(raised, axis=0)
    ranked = scores
    if correction_ptr is not None:
        ranked += tl.load(correction_ptr + index, mask=real, other=0.0).to(tl.float32)
    ranked = tl.where(real, ranked, float("-inf"))
    choice = tl.arange(0, BLOCK_K)
    experts = tl.zeros([BLOCK_K], tl.int32)
    shares = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(TOP_K):
        # Of numbers that are none anything may be the greatest, but no expert that is not there.
        best = tl.minimum(tl.argmax(ranked, axis=0), EXPERTS - 1)
        experts = tl.where(choice == k, best, experts)
        shares = tl.where(choice == k, tl.sum(tl.where(index == best, scores, 0.0), axis=0), shares)
        ranked = tl.where(index == best, float("-inf"), ranked)
    if NORMALIZE:
        total = tl.sum(shares, axis=0)
        if SIGMOID:
            total += 1e-20
        shares = shares / total
    wanted = choice < TOP_K
    tl.store(expert_ptr + token * TOP_K + choice, experts.to(tl.int64), mask=wanted)
    tl.store(share_ptr + token * TOP_K + choice, shares * scale, mask=wanted)


def choose(
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    top_k: int,
    *,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    groups: tuple[int, int, int] = (1, 1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> experts [T, K] int64, in no order, and shares [T, K] fp32.

    Scores are softmax or sigmoid of the logits; `correction` [E] fp32 changes who is chosen only. `groups`: how many
    the experts are cut into, how many of them are chosen from, and how many experts of a group make up its worth.
    """
    if groups[0] > 1 or not use_triton(logits):
        return choose_reference(
            logits, correction, top_k, sigmoid=sigmoid, normalize=normalize, scale=scale, groups=groups
        )
    tokens, count = logits.shape
    experts = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    shares = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _choose_kernel[(tokens,)](
            *(logits, correction, experts, shares, logits.stride(0), scale),
            *(count, top_k, sigmoid, normalize, next_power_of_two(count), next_power_of_two(top_k)),
            num_warps=1,
            **early_start(logits),
        )
    return experts, shares
