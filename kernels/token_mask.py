"""Tokens that a row may not draw, given as bits.

Shapes: B rows of logits, N of them masked, V vocabulary.
"""

from __future__ import annotations

import torch

from kernels.backend import constexpr, tensor, tl, triton_jit_for_any, use_triton

_BLOCK_V = 4096  # tokens a program


def apply_token_mask_reference(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """`apply_token_mask` in torch."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits.unsqueeze(2) >> shifts) & 1
    banned = allowed.flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, rows, logits[rows].masked_fill_(banned, -torch.inf))


@triton_jit_for_any(numbers=["vocab", "words"], pointers=["row_ptr", "bits_ptr"])
def _mask_kernel(
    logits_ptr: tensor,
    row_ptr: tensor,
    bits_ptr: tensor,
    logits_row: tensor,
    words: tensor,
    vocab: tensor,
    BLOCK_V: constexpr,
) -> None:
    """One part of one masked row a program."""
    n = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = token < vocab
    word = tl.load(bits_ptr + n * words + token // 32, mask=real, other=-1)
    banned = ((word >> (token % 32)) & 1) == 0
    row = tl.load(row_ptr + n)
    nothing = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    tl.store(logits_ptr + row * logits_row + token, nothing, mask=real & banned)


def apply_token_mask(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Set the logits of tokens that may not be drawn to -inf, in place.

    logits [B, V] fp32, tokens adjacent; rows [N] int64, each once; bits [N, at least V / 32] int32: token t of row n
    may be drawn where bit t % 32 of word t // 32 is set. Sources of the format: XGrammar and llguidance.
    """
    if not use_triton(logits):
        apply_token_mask_reference(logits, rows, bits)
    elif len(rows):
        vocab = logits.shape[1]
        _mask_kernel[(len(rows), -(-vocab // _BLOCK_V))](
            logits, rows, bits, logits.stride(0), bits.stride(0), vocab, _BLOCK_V, num_warps=4
        )
