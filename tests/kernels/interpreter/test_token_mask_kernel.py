"""The kernel of token masks against its reference."""

from __future__ import annotations

import pytest
import torch

from kernels.token_mask import apply_token_mask, apply_token_mask_reference


@pytest.mark.parametrize("vocab", [1, 33, 4096, 9001])
@pytest.mark.parametrize("masked", [[], [2], [4, 0, 2]])
def test_same_logits_as_the_reference(device, vocab, masked):
    random = torch.Generator().manual_seed(vocab)
    words = -(-vocab // 32)
    logits = torch.randn(5, vocab + 3, generator=random).to(device)[:, :vocab]  # rows further apart than they are long
    bits = torch.randint(-(2**31), 2**31 - 1, (len(masked), words), generator=random).to(device, torch.int32)
    rows = torch.tensor(masked, dtype=torch.int64, device=device)
    expected = logits.clone()
    apply_token_mask_reference(expected, rows, bits)
    apply_token_mask(logits, rows, bits)
    assert torch.equal(logits, expected)
