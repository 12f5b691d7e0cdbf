"""Masks of bits against plain loops, in the sampler as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.token_mask import apply_token_mask_reference


def bits_of(allowed: torch.Tensor, words: int) -> torch.Tensor:
    """[N, V] bool as words of 32 bits."""
    padded = np.zeros((len(allowed), words * 32), np.bool_)
    padded[:, : allowed.shape[1]] = allowed.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@pytest.mark.parametrize("vocab", [1, 31, 32, 301])
def test_only_what_is_allowed_is_left(vocab: int) -> None:
    random = torch.Generator().manual_seed(vocab)
    logits, rows = torch.randn(5, vocab, generator=random), torch.tensor([4, 0, 2])
    allowed = torch.rand(3, vocab, generator=random) < 0.5
    expected = logits.clone()
    for n, row in enumerate(rows.tolist()):
        expected[row, ~allowed[n]] = -torch.inf
    apply_token_mask_reference(logits, rows, bits_of(allowed, vocab // 32 + 2))
    assert torch.equal(logits, expected)
