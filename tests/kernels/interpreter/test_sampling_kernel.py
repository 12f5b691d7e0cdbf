"""The sampling kernel against its reference: the same tokens, not only the same distribution."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import (
    apply_penalties,
    apply_penalties_reference,
    greedy,
    greedy_reference,
    gumbel_argmax,
    gumbel_argmax_reference,
    gumbel_workspace_size,
)


def rows(count, vocab, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        tensor.to(device)
        for tensor in (
            torch.randn(count, vocab, generator=random) * 3,
            torch.tensor([0.0, 0.3, 1.0, 2.5] * count)[:count],
            torch.randint(-(2**63), 2**63 - 1, (count,), generator=random),
            torch.randint(0, 100_000, (count,), generator=random, dtype=torch.int32),
            torch.randint(0, 4, (count,), generator=random),
        )
    ]


@pytest.mark.parametrize("vocab", [1, 7, 1024, 2500])
def test_same_tokens_as_the_reference(device, vocab):
    batch = rows(8, vocab, device)
    assert torch.equal(gumbel_argmax(*batch), gumbel_argmax_reference(*batch))


def test_many_draws_from_flat_logits(device):
    """Flat logits: the noise alone decides, so a wrong bit anywhere shows."""
    logits, _, seeds, positions, choices = rows(40, 1300, device, seed=1)
    batch = (torch.zeros_like(logits), torch.ones(40, device=device), seeds, positions, choices)
    drawn = gumbel_argmax(*batch)
    assert torch.equal(drawn, gumbel_argmax_reference(*batch))
    assert drawn.unique().numel() > 30


def test_excluded_tokens_are_never_drawn(device):
    batch = rows(8, 1100, device, seed=2)
    batch[0][:, torch.arange(1100, device=device) != 1050] = -torch.inf
    assert gumbel_argmax(*batch).tolist() == [1050] * 8


def test_greedy_takes_the_lowest_of_equals_across_parts(device):
    batch = rows(2, 3000, device)
    batch[0].fill_(1.0)
    batch[0][1, [700, 1500, 2900]] = 5.0
    batch[1].zero_()
    assert gumbel_argmax(*batch).tolist() == [0, 700]


def test_rows_without_a_number_name_a_token_that_exists(device):
    batch = rows(4, 1030, device)
    batch[0][:2] = torch.nan
    batch[0][2:] = -torch.inf
    drawn = gumbel_argmax(*batch)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 1030


def test_workspace_contents_do_not_matter(device):
    batch = rows(5, 2500, device)
    workspace = torch.full((gumbel_workspace_size(5, 2500) + 3,), torch.nan, device=device)
    assert torch.equal(gumbel_argmax(*batch, workspace=workspace), gumbel_argmax_reference(*batch))


def test_half_precision_logits_are_taken_as_they_are(device):
    batch = rows(4, 500, device)
    batch[0] = batch[0].bfloat16()
    assert torch.equal(gumbel_argmax(*batch), gumbel_argmax(batch[0].float(), *batch[1:]))


def test_penalties(device):
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 1500, generator=random)
    logits[1, 7] = -torch.inf
    tensors = (
        logits,
        torch.rand(3, 1500, generator=random) < 0.3,
        torch.randint(0, 3, (3, 1500), generator=random, dtype=torch.int32),
        torch.tensor([0.5, 0.0, -1.0]),
        torch.tensor([0.2, 0.0, 0.7]),
        torch.tensor([1.3, 1.0, 0.8]),
    )
    on_device = [tensor.to(device) for tensor in tensors]
    torch.testing.assert_close(apply_penalties(*on_device), apply_penalties_reference(*on_device), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vocab", [1, 7, 4096, 9001])
def test_greedy_is_the_argmax(device, vocab):
    logits = rows(6, vocab, device, seed=3)[0].half()  # with equals among them
    assert torch.equal(greedy(logits), greedy_reference(logits))
    wide = torch.cat([logits, torch.full_like(logits, torch.inf)], dim=1)[:, :vocab]
    assert torch.equal(greedy(wide), greedy_reference(logits))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_greedy_names_rows_that_are_not_finite(device, bad):
    logits = rows(4, 5000, device, seed=4)[0]
    logits[1, 4500] = bad
    logits[3] = -torch.inf
    logits[0, 17] = -torch.inf
    got = greedy(logits).tolist()
    assert got == greedy_reference(logits).tolist()
    assert (got[1], got[3]) == (-1, -1)
    assert min(got[0], got[2]) >= 0
