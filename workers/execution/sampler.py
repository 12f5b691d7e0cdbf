"""Drawing the next tokens on the device. A row's draw depends on that row alone, whatever else is in the batch.

Stages, each for the rows that need it only: penalties, biases (logit bias, masked stop ids), bad words, allowed ids,
masks; then temperature, top-k, top-p, min-p; then the draw. Log-probabilities are of the logits as the model gave them.

Shapes: E emitting rows, V vocabulary, L tokens known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.sampling import apply_penalties, apply_top_k_top_p_min_p, greedy, gumbel_argmax
from kernels.token_mask import apply_token_mask
from workers.execution.bad_words import mask_bad_words
from workers.execution.sampling_state import (
    GREEDY,
    Allowed,
    Draws,
    Filters,
    NamedIds,
    Penalties,
    SamplingBatch,
    WantedLogprobs,
)
from workers.models.base import CausalModel

NOT_FINITE, NOTHING_ALLOWED = -1, -2  # the first is also what `greedy` says
FAULTS = {
    NOT_FINITE: "the model's logits are not finite",
    NOTHING_ALLOWED: "the request's filters allow no token at all",
}


@dataclass(frozen=True, slots=True)
class Logprobs:
    """For the rows of a `WantedLogprobs`: chosen [n] fp32, rank [n], top values and ids [n, most]; named [m] fp32."""

    chosen: torch.Tensor
    rank: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor
    named: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens [E] int64, or one of `FAULTS`."""

    tokens: torch.Tensor
    logprobs: Logprobs | None = None


def sample_own(model: CausalModel, own: torch.Tensor, batch: SamplingBatch, token_table: torch.Tensor) -> Sampled:
    """`sample` of the logits of which the ranks have parts `own`, see `CausalModel`; gathered where that is needed."""
    if batch is GREEDY:
        return Sampled(model.greedy_tokens(own))
    return sample(model.gather_logits(own), batch, token_table)


def sample(logits: torch.Tensor, batch: SamplingBatch, token_table: torch.Tensor) -> Sampled:
    """Draw one token a row. logits [E, V]; token_table [slots, >= L] holds each slot's tokens. Never waits."""
    if batch.only_scored:
        tokens = greedy(logits)
        return Sampled(tokens, _logprobs(logits, tokens, batch.logprobs))
    work = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    finite = work.amax(dim=-1).isfinite()
    if batch.penalties is not None:
        _penalize(work, batch.penalties, token_table)
    if batch.biases is not None:
        b = batch.biases
        work.index_put_((b.rows, b.ids), b.values, accumulate=True)
    if batch.bad_words is not None:
        mask_bad_words(work, batch.bad_words, token_table)
    if batch.allowed is not None:
        _allow(work, batch.allowed)
    if batch.masks is not None:
        apply_token_mask(work, batch.masks.rows, batch.masks.bits)
    if batch.filters is not None:
        _filter(work, batch.filters)
    drawn = work.argmax(dim=-1) if batch.draws is None else _draw(work, batch.draws)
    allowed = work.gather(1, drawn.unsqueeze(1)).squeeze(1) > -torch.inf
    tokens = torch.where(finite, torch.where(allowed, drawn, NOTHING_ALLOWED), NOT_FINITE)
    return Sampled(tokens, _logprobs(logits, drawn, batch.logprobs))


def _draw(work: torch.Tensor, draws: Draws) -> torch.Tensor:
    return gumbel_argmax(work, draws.temperatures, draws.seeds, draws.positions, draws.choices)


def _penalize(work: torch.Tensor, p: Penalties, token_table: torch.Tensor) -> None:
    """Counts come from the token table: no state of its own, and tokens that the host has not seen yet count."""
    rows, vocab = p.rows.shape[0], work.shape[1]
    tokens = token_table[p.slots, : p.longest].long()
    at = torch.arange(p.longest, device=work.device)
    in_prompt = at < p.prompt.unsqueeze(1)
    emitted = (at < p.known.unsqueeze(1)) & ~in_prompt
    # One more column takes what does not count.
    mask = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=work.device)
    mask.scatter_(1, tokens.masked_fill(~(in_prompt & (at < p.known.unsqueeze(1))), vocab).clamp_(0, vocab), True)
    counts = torch.zeros(rows, vocab + 1, dtype=torch.int32, device=work.device)
    index = tokens.masked_fill(~emitted, vocab).clamp_(0, vocab)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    penalized = apply_penalties(work[p.rows], mask[:, :vocab], counts[:, :vocab], p.presence, p.frequency, p.repetition)
    work.index_copy_(0, p.rows, penalized)


def _allow(work: torch.Tensor, a: Allowed) -> None:
    banned = torch.ones(a.rows.shape[0], work.shape[1], dtype=torch.bool, device=work.device)
    banned[a.index, a.ids] = False
    work.index_copy_(0, a.rows, work[a.rows].masked_fill_(banned, -torch.inf))


def _filter(work: torch.Tensor, f: Filters) -> None:
    """Only the mask is taken over: the draw divides by the temperature itself, for filtered rows and others alike."""
    rows = work[f.rows]
    kept = apply_top_k_top_p_min_p(rows / f.temperatures.unsqueeze(1), f.top_k, f.top_p, f.min_p)
    work.index_copy_(0, f.rows, rows.masked_fill_(kept.isneginf(), -torch.inf))


def score(logits: torch.Tensor, tokens: torch.Tensor, top: int, named: NamedIds | None = None) -> Logprobs:
    """Of `tokens` [n] under logits [n, V], with the `top` most likely ones, and of those that are `named`."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    rank = (logprobs > chosen).sum(dim=-1) + 1
    found, ids = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    of_named = None if named is None else logprobs[named.index, named.ids]
    return Logprobs(chosen.squeeze(1), rank, found, ids, of_named)


def _logprobs(logits: torch.Tensor, drawn: torch.Tensor, wanted: WantedLogprobs | None) -> Logprobs | None:
    if wanted is None:
        return None
    # A fault's are not looked at.
    return score(logits[wanted.rows], drawn[wanted.rows].clamp(min=0), max(wanted.counts), wanted.named)
