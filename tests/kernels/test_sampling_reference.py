"""Philox against its published answers, draws against their distribution, filters and penalties against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.sampling import apply_penalties, apply_top_k_top_p_min_p, gumbel_argmax, gumbel_noise, philox

# Known answers of Random123, philox4x32_10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    got = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(word) for word in got) == words


def test_counter_is_token_position_choice():
    seed, position, choice = 0x299F31D0_00000007, 12, 3
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor([choice]), 40)[0]
    for token in (0, 1, 39):
        counter = tuple(torch.tensor(c) for c in (token, position, choice, 0))
        word = int(philox(counter, (torch.tensor(7), torch.tensor(0x299F31D0)))[0])
        exact = -math.log(-math.log1p(-(word + 0.5) / 2**32))
        assert float(noise[token]) == pytest.approx(exact, rel=1e-5, abs=1e-6)


def draw(logits, temperature, seeds, positions=None, choices=None):
    rows = len(seeds)
    zeros = torch.zeros(rows, dtype=torch.int64)
    return gumbel_argmax(
        logits.expand(rows, -1),
        torch.full((rows,), temperature),
        seeds,
        zeros if positions is None else positions,
        zeros if choices is None else choices,
    )


@pytest.mark.parametrize("varied", ["seed", "position", "choice"])
def test_draws_follow_the_softmax(varied):
    logits, rows = torch.tensor([[0.0, 2.0, -1.0, 1.0, -torch.inf, 0.5]]), 20_000
    many, one = torch.arange(rows), torch.full((rows,), 77)
    drawn = draw(logits, 0.7, *(many if varied == name else one for name in ("seed", "position", "choice")))
    share = torch.bincount(drawn, minlength=6) / rows
    expected = (logits[0] / 0.7).softmax(dim=-1)
    # Five standard deviations of a share.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()).all()


def test_negative_seed_is_its_uint64():
    noise = gumbel_noise(torch.tensor([-2]), torch.tensor([0]), torch.tensor([0]), 3)[0]
    word = philox((torch.arange(3), *[torch.tensor(0)] * 3), (torch.tensor(0xFFFFFFFE), torch.tensor(0xFFFFFFFF)))[0]
    expected = -torch.log(-torch.log1p(-(word.double() + 0.5) / 2**32))
    torch.testing.assert_close(noise.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_row_draws_the_same_in_any_batch():
    torch.manual_seed(7)
    logits, seeds, positions = torch.randn(9, 301), torch.randint(0, 2**62, (9,)), torch.arange(9)
    temperatures = torch.tensor([0.0, 1.0, 0.3] * 3)
    zeros = torch.zeros(9, dtype=torch.int64)
    together = gumbel_argmax(logits, temperatures, seeds, positions, zeros)
    alone = [
        gumbel_argmax(logits[i : i + 1], temperatures[i : i + 1], seeds[i : i + 1], positions[i : i + 1], zeros[:1])
        for i in range(9)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    drawn = gumbel_argmax(logits, torch.zeros(2), *(torch.zeros(2, dtype=torch.int64),) * 3)
    assert drawn.tolist() == [1, 0]
    assert drawn.dtype == torch.int64


def filtered(probabilities, top_k=0, top_p=1.0, min_p=0.0):
    logits = torch.tensor([probabilities]).log()
    out = apply_top_k_top_p_min_p(logits, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    kept = out[0] > -torch.inf
    assert torch.equal(out[0][kept], logits[0][kept])
    return kept.nonzero().flatten().tolist()


def test_filters_keep_the_right_tokens():
    p = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert filtered(p) == [0, 1, 2, 3, 4]
    assert filtered(p, top_k=2) == [1, 3]
    assert filtered(p, top_k=99) == [0, 1, 2, 3, 4]
    assert filtered(p, top_p=0.65) == [1, 3]
    assert filtered(p, top_p=0.72) == [1, 3, 4]
    assert filtered(p, top_p=0.0) == [1]
    assert filtered(p, min_p=0.3) == [1, 3, 4]
    assert filtered(p, min_p=1.0) == [1]
    # Top-p counts within what top-k left: 0.4 of 0.85 is less than half, 0.7 of it is enough for 0.8.
    assert filtered(p, top_k=3, top_p=0.8) == [1, 3]
    assert filtered(p, top_k=1, top_p=0.9, min_p=0.1) == [1]


def test_equal_logits_keep_the_lowest_ids_in_top_p():
    assert filtered([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]


def test_filters_are_a_row_of_their_own():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4).log()
    out = apply_top_k_top_p_min_p(
        logits, torch.tensor([0, 1, 0, 0]), torch.tensor([1.0, 1.0, 0.6, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.3])
    )
    assert (out > -torch.inf).sum(dim=-1).tolist() == [4, 1, 2, 3]


def test_filters_agree_with_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(8)
    logits = torch.randn(6, 200) * 3
    for top_k, top_p, min_p in [(20, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (50, 0.8, 0.1)]:
        expected = logits
        if top_k:
            expected = process.TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = process.TopPLogitsWarper(top_p)(None, expected)
        if min_p:
            expected = process.MinPLogitsWarper(min_p)(None, expected)
        rows = [torch.full((6,), value) for value in (top_k, top_p, min_p)]
        assert torch.equal(apply_top_k_top_p_min_p(logits, *rows), expected)


def test_penalties():
    torch.manual_seed(9)
    rows, vocab = 3, 11
    logits, prompt = torch.randn(rows, vocab), torch.rand(rows, vocab) < 0.3
    logits[0, 0] = -torch.inf
    counts = torch.randint(0, 3, (rows, vocab))
    presence, frequency = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([0.2, 0.0, 0.7])
    repetition = torch.tensor([1.3, 1.0, 0.8])
    out = apply_penalties(logits, prompt, counts, presence, frequency, repetition)
    for b in range(rows):
        for t in range(vocab):
            value, count = float(logits[b, t]), int(counts[b, t])
            if prompt[b, t] or count:
                value = value / float(repetition[b]) if value > 0 else value * float(repetition[b])
            value -= float(frequency[b]) * count + float(presence[b]) * (count > 0)
            assert float(out[b, t]) == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert torch.equal(out[1], logits[1])
