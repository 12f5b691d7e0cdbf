"""Drawing tokens from logits with counter-based random numbers.

A draw depends on the logits and on (seed, position, choice) only: not on the batch, the replica or the device, so that
a replay elsewhere draws the same tokens.

Shapes: B sequences, V vocabulary.
Sources: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011 (Philox4x32-10); Gumbel, 1954 (the argmax of
logits with Gumbel noise is a draw from their softmax).
"""

from __future__ import annotations

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

_WORD = 0xFFFFFFFF
# The multipliers less 2^32: every product then fits a signed 64-bit integer.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Tokens a program.
_BLOCK_V = 1024
_BLOCK_GREEDY = 4096

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply(x: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of x * (multiplier + 2^32)."""
    product = x * multiplier
    low = product & _WORD
    return product.bitwise_right_shift_(32).add_(x), low


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Philox4x32-10: four random words for each counter and key.

    All are int64 tensors of values below 2^32 and broadcast against each other. Parts of a counter that are the same
    for a whole row or column should come unexpanded: the first rounds are then done once for all.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(a, _MULTIPLIERS[0])
        high_c, low_c = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ (b ^ first), low_c, high_a ^ (d ^ second), low_a
        first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
    return a, b, c, d


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, choices: torch.Tensor, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise [B, V] fp32 for seeds [B] int64 (the bits of a uint64), positions [B] and choices [B].

    -log(E), where E is exponential: -log(1 - v) for a uniform v, by its series below 2^-8, where fp32 would cancel.
    """
    tokens = torch.arange(vocab, device=seeds.device).unsqueeze(0)
    rows = seeds.long().unsqueeze(1)
    at, choice = (column.long().unsqueeze(1) & _WORD for column in (positions, choices))
    word, _, _, _ = philox((tokens, at, choice, torch.zeros_like(rows)), (rows & _WORD, (rows >> 32) & _WORD))
    v = (word.float() + 0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    series = v * (1 + v * (0.5 + v / 3))
    exponential = torch.where(v < 2.0**-8, series, -torch.log(1 - v))
    return -torch.log(exponential)


def gumbel_argmax_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    choices: torch.Tensor,
) -> torch.Tensor:
    """`gumbel_argmax` in torch; on CUDA it waits for the device."""
    logits = logits.float()
    drawn = logits.argmax(dim=-1)
    rows = (temperatures > 0).nonzero().flatten()
    if rows.numel():
        noise = gumbel_noise(seeds[rows], positions[rows], choices[rows], logits.shape[1])
        drawn[rows] = (logits[rows] / temperatures[rows].unsqueeze(1)).add_(noise).argmax(dim=-1)
    return drawn


def apply_top_k_top_p_min_p(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Set the logits of the tokens that the filters exclude to -inf; returns a new tensor.

    logits [B, V] fp32, already divided by the temperature; top_k [B] int, 0 for off; top_p [B], 1 for off; min_p [B], 0
    for off. In this order: the top_k greatest are kept (and those equal to the last of them); of these, the least set
    whose probability reaches top_p; of the rest, those at least min_p times as probable as the best. The best token is
    always kept. Sources: Holtzman et al., 2019 (top-p); Nguyen et al., 2024 (min-p).
    """
    # Stable, so that of equal logits the lowest ids are kept, on every device.
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, logits.shape[1]).clamp(max=logits.shape[1]).long().unsqueeze(1) - 1
    ranked = ranked.masked_fill(ranked < ranked.gather(1, last), -torch.inf)
    probability = ranked.softmax(dim=-1)
    excluded = probability.cumsum(dim=-1).sub_(probability) >= torch.where(top_p < 1, top_p, 2.0).unsqueeze(1)
    # p < min_p * p_max, in logits.
    excluded |= ranked < ranked[:, :1] + min_p.unsqueeze(1).log()
    excluded[:, 0] = False
    return torch.empty_like(logits).scatter_(1, order, ranked.masked_fill_(excluded, -torch.inf))


def apply_penalties_reference(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """`apply_penalties` in torch."""
    occurred = counts > 0
    factor = torch.where(prompt_mask | occurred, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency.unsqueeze(1) * counts - presence.unsqueeze(1) * occurred


@triton_jit
def _penalty_kernel(
    logits_ptr: tensor,
    prompt_ptr: tensor,
    count_ptr: tensor,
    presence_ptr: tensor,
    frequency_ptr: tensor,
    repetition_ptr: tensor,
    out_ptr: tensor,
    logits_row: tensor,
    prompt_row: tensor,
    count_row: tensor,
    vocab: tensor,
    BLOCK_V: constexpr,
) -> None:
    """One part of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = token < vocab
    logits = tl.load(logits_ptr + row * logits_row + token, mask=real)
    count = tl.load(count_ptr + row * count_row + token, mask=real, other=0)
    prompt = tl.load(prompt_ptr + row * prompt_row + token, mask=real, other=0)
    factor = tl.where((prompt != 0) | (count > 0), tl.load(repetition_ptr + row), 1.0)
    logits = tl.where(logits > 0, tl.div_rn(logits, factor), logits * factor)
    logits -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    logits -= tl.load(presence_ptr + row) * (count > 0).to(tl.float32)
    tl.store(out_ptr + row * vocab + token, logits, mask=real)


def apply_penalties(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Penalize tokens that have occurred; returns a new tensor [B, V].

    logits [B, V] fp32; prompt_mask [B, V] bool: tokens of the prompt; counts [B, V] int: occurrences in the output;
    presence, frequency (0 for off) and repetition (1 for off) [B] fp32. Repetition goes first and looks at prompt and
    output: positive logits are divided by it, others multiplied. Presence and frequency look at the output only.
    Source: Keskar et al., CTRL, 2019 (repetition); the OpenAI API (the other two).
    """
    if use_triton(logits):
        batch, vocab = logits.shape
        out = torch.empty((batch, vocab), dtype=logits.dtype, device=logits.device)
        if batch:
            _penalty_kernel[(batch, -(-vocab // _BLOCK_V))](
                *(logits, prompt_mask, counts, presence, frequency, repetition, out),
                *(logits.stride(0), prompt_mask.stride(0), counts.stride(0), vocab, _BLOCK_V),
                num_warps=4,
            )
        return out
    return apply_penalties_reference(logits, prompt_mask, counts, presence, frequency, repetition)


@triton_jit
def _gumbel_noise_tile(token: tensor, seed: tensor, position: tensor, choice: tensor) -> tensor:
    """Noise of one row for the tokens `token` [BLOCK_V] int32; the steps are those of `gumbel_noise`."""
    low_half: tl.constexpr = 0xFFFFFFFF
    a = token.to(tl.uint64)
    b = token.to(tl.uint64) * 0 + (position.to(tl.uint64) & low_half)
    c = token.to(tl.uint64) * 0 + (choice.to(tl.uint64) & low_half)
    d = token.to(tl.uint64) * 0
    first = seed.to(tl.uint64) & low_half
    second = seed.to(tl.uint64) >> 32
    for _ in tl.static_range(10):
        # Both factors are below 2^32: one wide multiplication.
        product_a = a * 0xD2511F53
        product_c = c * 0xCD9E8D57
        a = (product_c >> 32) ^ b ^ first
        b = product_c & low_half
        c = (product_a >> 32) ^ d ^ second
        d = product_a & low_half
        first = (first + 0x9E3779B9) & low_half
        second = (second + 0xBB67AE85) & low_half
    v = tl.minimum((a.to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (1.0 + v * (0.5 + v / 3.0))
    return -tl.log(tl.where(v < 0.00390625, series, -tl.log(1.0 - v)))


@triton_jit_for_any(pointers=["token_ptr"])
def _score_kernel(
    logits_ptr: tensor,
    best_ptr: tensor,
    token_ptr: tensor,
    temperature_ptr: tensor,
    seed_ptr: tensor,
    position_ptr: tensor,
    choice_ptr: tensor,
    logits_row: tensor,
    vocab: tensor,
    BLOCK_V: constexpr,
) -> None:
    """The best score of one part of one row a program, and whose it is."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    score = tl.load(logits_ptr + row * logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        noise = _gumbel_noise_tile(
            token, tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(choice_ptr + row)
        )
        score = tl.div_rn(score, temperature) + noise
    best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + part
    tl.store(best_ptr + at, best)
    # A row without a number still names a token that exists.
    tl.store(token_ptr + at, tl.minimum(part * BLOCK_V + index, vocab - 1))


@triton_jit_for_any(pointers=["token_ptr"])
def _pick_kernel(best_ptr: tensor, token_ptr: tensor, out_ptr: tensor, parts: tensor, BLOCK_P: constexpr) -> None:
    """The best of its parts, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    score = tl.load(best_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    _, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(token_ptr + row * parts + tl.minimum(index, parts - 1))
    tl.store(out_ptr + row, token.to(tl.int64))


def greedy_reference(logits: torch.Tensor) -> torch.Tensor:
    """`greedy` in torch."""
    return greedy_with_score_reference(logits)[0]


def greedy_with_score_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy_with_score` in torch."""
    drawn = logits.argmax(dim=-1)
    # argmax takes a NaN for the greatest, so a row with one shows it here.
    best = logits.gather(1, drawn.unsqueeze(1)).squeeze(1).float()
    return torch.where(best.isfinite(), drawn, -1), torch.where(best.isnan(), torch.inf, best)


@triton_jit
def _best_kernel(
    logits_ptr: tensor,
    best_ptr: tensor,
    token_ptr: tensor,
    logits_row: tensor,
    vocab: tensor,
    BLOCK_V: constexpr,
    EARLY: constexpr,
) -> None:
    """The greatest logit of one part of one row a program, +inf where one is not a number, and whose it is."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("inf"))  # noqa: PLR0124 (false of a NaN)
    best, index = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + part
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, part * BLOCK_V + index)


@triton_jit
def _pick_finite_kernel(
    best_ptr: tensor,
    token_ptr: tensor,
    out_ptr: tensor,
    score_ptr: tensor,
    parts: tensor,
    SCORE: constexpr,
    BLOCK_P: constexpr,
    EARLY: constexpr,
) -> None:
    """The best of its parts, or -1, and its logit, one row a program."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    score = tl.load(best_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(token_ptr + row * parts + index)
    tl.store(out_ptr + row, tl.where(tl.abs(best) < float("inf"), token, -1).to(tl.int64))
    if SCORE:
        tl.store(score_ptr + row, best)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The token of the greatest logit, of equals the lowest: logits [B, V], tokens adjacent -> [B] int64.

    -1 where that logit is infinite or any is not a number.
    """
    if not use_triton(logits):
        return greedy_reference(logits)
    return _launch_greedy(logits, None)


def greedy_with_score(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy`, and the greatest logit of each row [B] fp32, +inf where one is not a number."""
    if not use_triton(logits):
        return greedy_with_score_reference(logits)
    score = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    return _launch_greedy(logits, score), score


def _launch_greedy(logits: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
    batch, vocab = logits.shape
    parts = -(-vocab // _BLOCK_GREEDY)
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch:
        best = torch.empty((batch, parts), dtype=torch.float32, device=logits.device)
        token = torch.empty((batch, parts), dtype=torch.int32, device=logits.device)
        early = early_start(logits)
        grid, block = (batch, parts), next_power_of_two(parts)
        _best_kernel[grid](logits, best, token, logits.stride(0), vocab, _BLOCK_GREEDY, num_warps=4, **early)
        scores = best if score is None else score
        _pick_finite_kernel[(batch,)](best, token, out, scores, parts, score is not None, block, num_warps=1, **early)
    return out


def gumbel_workspace_size(batch: int, vocab: int) -> int:
    """How many fp32 elements of workspace `gumbel_argmax` needs for B rows of V logits."""
    return 2 * batch * -(-vocab // _BLOCK_V)


def _launch_gumbel(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    choices: torch.Tensor,
    workspace: torch.Tensor | None,
) -> torch.Tensor:
    batch, vocab = logits.shape
    parts = -(-vocab // _BLOCK_V)
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if not batch:
        return out
    if workspace is None:
        workspace = torch.empty(gumbel_workspace_size(batch, vocab), dtype=torch.float32, device=logits.device)
    best, token = workspace[: batch * parts], workspace[batch * parts : 2 * batch * parts].view(torch.int32)
    _score_kernel[(batch, parts)](
        *(logits, best, token, temperatures, seeds, positions, choices, logits.stride(0), vocab, _BLOCK_V), num_warps=4
    )
    _pick_kernel[(batch,)](best, token, out, parts, next_power_of_two(parts), num_warps=1)
    return out


def gumbel_argmax(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    choices: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a row from softmax(logits / temperature).

    logits [B, V] fp32 (bf16 and fp16 are taken as they are), -inf where a token is not allowed; temperatures [B] fp32,
    0 for the argmax (of equals the lowest id); seeds [B] int64, the bits of a uint64; positions [B] int32 or int64, of
    the token to be drawn in its sequence; choices [B] int, which of a request's n answers. Returns [B] int64. The
    random words are word 0 of Philox4x32-10 with key (low word, high word of the seed) and counter (token id, position,
    choice, 0). workspace: fp32, of at least `gumbel_workspace_size` elements, for calls that may not allocate; its
    contents do not matter.
    """
    if use_triton(logits):
        return _launch_gumbel(logits, temperatures, seeds, positions, choices, workspace)
    return gumbel_argmax_reference(logits, temperatures, seeds, positions, choices)
