"""The sampler: every stage does what it says, to its own rows alone, and draws follow `workers.api.philox`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from thread_ranks import on_ranks
from tiny import added, plan_logits, prompt, rank_of, reference, request, run

from workers.api.philox import exponential
from workers.api.request import SamplingParams
from workers.engine.plan import StepPlan, StepResult
from workers.execution.inputs import BatchState
from workers.execution.sampler import sample
from workers.parallel.group import Groups
from workers.rank import Rank, run_to_completion


class Bench:
    """Draws from given logits, one row a slot, each slot with `known` tokens of which `prompts` are prompt."""

    def __init__(self, logits: torch.Tensor, known: list[tuple[int, ...]], prompts: list[int]) -> None:
        self.logits = logits
        self.known, self.prompts = known, prompts

    def draw(self, *params: SamplingParams, rows: list[int] | None = None) -> Any:
        """What `sample` returns for these rows (all of them where not given)."""
        rows = rows if rows is not None else list(range(len(params)))
        state = BatchState(
            max_num_seqs=8, max_model_len=64, block_size=16, vocab_size=self.logits.shape[1], device=torch.device("cpu")
        )
        new = []
        for slot, (row, p) in enumerate(zip(rows, params, strict=True)):
            one = added(slot, self.known[row], blocks=(slot * 4, slot * 4 + 1))
            new.append(type(one)(slot, one.token_ids, self.prompts[row], p, one.blocks))
        steps = tuple(run(slot, len(self.known[row]) - 1, 1) for slot, row in enumerate(rows))
        inputs = state.prepare(StepPlan(1, (), tuple(new), steps))
        before = self.logits.clone()
        out = sample(self.logits[rows], inputs.sampling, state.token_table)
        torch.testing.assert_close(self.logits, before, rtol=0, atol=0, equal_nan=True)
        return out

    def tokens(self, *params: SamplingParams, rows: list[int] | None = None) -> list[int]:
        return self.draw(*params, rows=rows).tokens.tolist()


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **changes})


@pytest.fixture
def bench() -> Bench:
    torch.manual_seed(3)
    known = [prompt(5 + row, seed=row, vocab=50) for row in range(6)]
    return Bench(torch.randn(6, 50) * 2, known, [5, 4, 3, 5, 6, 2])


def test_greedy_is_argmax_and_of_equals_the_first(bench: Bench) -> None:
    bench.logits[2, 7] = bench.logits[2, 30] = 99.0
    assert bench.tokens(*[params()] * 6) == bench.logits.argmax(-1).tolist()
    assert bench.tokens(*[params()] * 6)[2] == 7
    assert bench.tokens(params(), params(temperature=1.0), rows=[2, 3])[0] == 7


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 + 11, 2**64 - 1])
def test_a_draw_is_that_of_the_definition(bench: Bench, seed: int) -> None:
    for row, choice, temperature in ((0, 0, 1.0), (3, 2, 0.7), (5, 1, 1.9)):
        position = len(bench.known[row])
        scores = [
            float(bench.logits[row, token]) / temperature - math.log(exponential(seed, choice, position, token))
            for token in range(50)
        ]
        want = max(range(50), key=scores.__getitem__)
        assert bench.tokens(params(temperature=temperature, seed=seed, choice=choice), rows=[row]) == [want]


MIXED = [
    params(temperature=0.9, seed=4, top_k=8, presence_penalty=0.5),
    params(temperature=1.3, seed=5, logprobs=2),
    params(),
    params(temperature=1.0, seed=6, top_p=0.8, min_p=0.05, repetition_penalty=1.3, logit_bias=((3, 2.0),)),
    params(temperature=0.8, seed=2**64 - 1, allowed_ids=(1, 5, 9, 44)),
    params(frequency_penalty=1.0, min_tokens=40, stop_ids=(0, 1, 2)),
]


def test_a_row_draws_the_same_alone_and_in_any_company(bench: Bench) -> None:
    alone = [bench.tokens(p, rows=[row])[0] for row, p in enumerate(MIXED)]
    assert bench.tokens(*MIXED) == alone
    order = [4, 2, 0, 5, 1, 3]
    assert bench.tokens(*(MIXED[i] for i in order), rows=order) == [alone[i] for i in order]


def test_draws_have_the_probabilities_of_the_softmax(bench: Bench) -> None:
    bench.logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    bench.known = [(1, 2, 3)]
    counts = [0] * 4
    for first in range(0, 4000, 8):
        drawn = bench.tokens(*(params(temperature=1.0, seed=first + i) for i in range(8)), rows=[0] * 8)
        for token in drawn:
            counts[token] += 1
    want = bench.logits[0].softmax(-1).tolist()
    for count, p in zip(counts, want, strict=True):
        assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


def drawn_set(bench: Bench, row: int, **changes: Any) -> set[int]:
    drawn: set[int] = set()
    for first in range(0, 480, 8):
        some = (params(temperature=1.5, seed=first + i, **changes) for i in range(8))
        drawn.update(bench.tokens(*some, rows=[row] * 8))
    return drawn


def test_top_k_top_p_and_min_p_keep_what_they_should(bench: Bench) -> None:
    ranked = bench.logits[1].argsort(descending=True).tolist()
    assert drawn_set(bench, 1, top_k=1) == {ranked[0]}
    assert drawn_set(bench, 1, top_k=4) == set(ranked[:4])
    p = (bench.logits[1] / 1.5).softmax(-1)[ranked]
    kept = int((p.cumsum(0) - p < 0.5).sum())
    assert 1 < kept < 12
    assert drawn_set(bench, 1, top_p=0.5) == set(ranked[:kept])
    pair = p[:2] / p[:2].sum()  # top-p counts what top-k has left
    assert drawn_set(bench, 1, top_p=float(pair[0]) - 0.01, top_k=2) == {ranked[0]}
    assert drawn_set(bench, 1, top_p=float(pair[0]) + 0.01, top_k=2) == set(ranked[:2])
    above = {t for t, q in zip(ranked, p.tolist(), strict=True) if q >= 0.4 * float(p[0])}
    assert drawn_set(bench, 1, min_p=0.4) == above


def test_penalties_count_prompt_and_output_apart(bench: Bench) -> None:
    # Known: 7 7 9 | 9 9 4, the bar after the prompt.
    bench.logits = torch.full((1, 50), -9.0)
    bench.logits[0, [7, 9, 4, 20]] = torch.tensor([3.0, 4.0, 2.0, 1.0])
    bench.known, bench.prompts = [(7, 7, 9, 9, 9, 4)], [3]
    assert bench.tokens(params(), rows=[0]) == [9]
    assert bench.tokens(params(presence_penalty=1.1), rows=[0]) == [7]  # 9 has occurred: 2.9; 7 only in the prompt
    assert bench.tokens(params(presence_penalty=0.9), rows=[0]) == [9]
    assert bench.tokens(params(frequency_penalty=0.6), rows=[0]) == [7]  # 4 - 2 * 0.6
    assert bench.tokens(params(frequency_penalty=0.4), rows=[0]) == [9]
    assert bench.tokens(params(repetition_penalty=5.0), rows=[0]) == [20]  # all others are divided by 5
    assert bench.tokens(params(frequency_penalty=-2.0, presence_penalty=-1.0), rows=[0]) == [9]


def test_bias_allowed_and_min_tokens(bench: Bench) -> None:
    best = int(bench.logits[1].argmax())
    assert bench.tokens(params(logit_bias=((13, 100.0),)), rows=[1]) == [13]
    assert bench.tokens(params(logit_bias=((best, -100.0), (10**6, 5.0), (-1, 9.0))), rows=[1]) != [best]
    allowed = bench.tokens(params(allowed_ids=(2, 11, 40, 10**6)), rows=[1])
    assert allowed == [max((2, 11, 40), key=lambda t: float(bench.logits[1, t]))]
    # Row 1 has 6 tokens, 4 of them prompt: 2 were emitted, this is the third.
    assert bench.tokens(params(stop_ids=(best,), min_tokens=2), rows=[1]) == [best]
    assert bench.tokens(params(stop_ids=(best,), min_tokens=3), rows=[1]) != [best]


def test_rows_without_a_token_to_draw_are_faults_of_their_own(bench: Bench) -> None:
    bench.logits[1, 17] = torch.nan
    bench.logits[3] = torch.inf
    plain = bench.tokens(*[params()] * 6)
    assert [t < 0 for t in plain] == [False, True, False, True, False, False]
    both = bench.tokens(
        *[params(temperature=1.0, top_p=0.9)] * 4, params(allowed_ids=(3,), stop_ids=(3,), min_tokens=9)
    )
    assert [t < 0 for t in both] == [False, True, False, True, True]


def test_logprobs_are_of_the_unfiltered_distribution(bench: Bench) -> None:
    out = bench.draw(params(temperature=0.5, top_k=3, seed=1, logprobs=4), params(), params(logprobs=0))
    want = bench.logits.log_softmax(-1)
    tokens = out.tokens.tolist()
    torch.testing.assert_close(out.logprobs.chosen, torch.stack([want[0, tokens[0]], want[2, tokens[2]]]))
    assert out.logprobs.rank.tolist() == [1 + int((want[r] > want[r, tokens[r]]).sum()) for r in (0, 2)]
    assert out.logprobs.top_ids[0].tolist() == want[0].topk(4).indices.tolist()


def test_named_tokens_are_scored_in_their_rows(bench: Bench) -> None:
    asked = [(7, 49, 0), (), (3,), tuple(range(50))]
    out = bench.draw(
        params(temperature=0.5, top_k=3, seed=1, logprobs=0, logprob_ids=asked[0]),
        params(),
        params(logprobs=2),
        params(logprobs=0, logprob_ids=asked[2], allowed_ids=(4,)),
        params(logprobs=0, logprob_ids=(*asked[3], 50, 10**6)),  # no logits stand for the last two
    )
    want = bench.logits.log_softmax(-1)
    rows = [0] * 3 + [3] + [4] * 50
    torch.testing.assert_close(out.logprobs.named, want[rows, [i for ids in asked for i in ids]])
    assert out.logprobs.top_ids[1].tolist() == want[2].topk(2).indices.tolist()
    assert bench.draw(params(logprobs=1)).logprobs.named is None


def sampled(seed: int) -> dict[str, Any]:
    return {"temperature": 0.9, "top_p": 0.95, "seed": seed, "max_tokens": 12}


def test_seeded_requests_draw_the_same_alone_together_chunked_and_resumed() -> None:
    prompts = [prompt(n, seed=2) for n in (4, 19, 50, 33)]
    requests = [request(str(i), p, **sampled(i)) for i, p in enumerate(prompts)]
    together = run_to_completion(rank_of("llama").make_engine(), requests)
    alone: dict[str, list[int]] = {}
    for one in requests:
        alone |= run_to_completion(rank_of("llama").make_engine(), [one])
    assert alone == together
    assert run_to_completion(rank_of("llama", max_num_batched_tokens=32).make_engine(), requests) == together
    assert run_to_completion(rank_of("llama", num_blocks=10, block_size=8).make_engine(), requests) == together
    first = requests[1]
    resumed = type(first)(first.id, first.prompt_ids, first.sampling, resumed_ids=tuple(together["1"][:5]))
    assert run_to_completion(rank_of("llama").make_engine(), [resumed])["1"] == together["1"][5:]
    assert len({tuple(tokens) for tokens in together.values()}) == 4


def step(rank: Rank, plan: StepPlan) -> StepResult:
    return rank.runner.submit(plan).result()


def test_logprobs_through_the_runner_belong_to_their_slots() -> None:
    rank, ids = rank_of("llama"), prompt(12)
    plan = StepPlan(
        1,
        (),
        (added(5, ids, blocks=(1,), logprobs=3), added(2, ids[:7], blocks=(2,))),
        (run(5, 0, 12), run(2, 0, 7)),
    )
    want = plan_logits(rank, plan)[11].log_softmax(-1)
    five, two = step(rank, plan).slots
    assert (five.slot, two.slot, two.logprobs) == (5, 2, ())
    (logprob,) = five.logprobs
    assert logprob.token_id == five.token_ids[0] == int(want.argmax())
    assert logprob.rank == 1
    assert logprob.top[0][0] == logprob.token_id
    assert [v for _, v in logprob.top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)


def test_named_tokens_through_two_ranks_follow_the_drawn_one() -> None:
    ids = prompt(12)
    drawn = int(plan_logits(rank_of("llama"), StepPlan(1, (), (added(0, ids),), (run(0, 0, 12),)))[11].argmax())
    names = (300, 5, drawn, 17)

    def work(number: int, groups: Groups) -> list[StepResult]:
        own = rank_of("llama", rank=number, groups=groups, num_blocks=8)
        new = (
            added(5, ids, blocks=(1,), logprobs=0, logprob_ids=names),
            added(2, ids[:7], blocks=(2,), logprobs=2),
            added(3, ids[:9], blocks=(3,), logprobs=4, logprob_ids=(8,)),
        )
        plans = (
            StepPlan(1, (), new, (run(5, 0, 12), run(2, 0, 7), run(3, 0, 9))),
            StepPlan(2, (5,), (added(5, ids, blocks=(1,), logprobs=1),), (run(5, 0, 12),)),
        )
        return [step(own, plan) for plan in plans]

    (first, later), _ = on_ranks(2, work)
    with torch.inference_mode():
        want = reference("llama")(torch.tensor([ids])).logits[0].log_softmax(-1)
    five, two, three = (one.logprobs[0] for one in first.slots)
    assert [token for token, _ in five.top] == [drawn, 300, 5, 17]
    assert [token for token, _ in later.slots[0].logprobs[0].top] == [drawn]  # another sequence in that slot
    assert [token for token, _ in two.top] == want[6].topk(2).indices.tolist()
    assert [token for token, _ in three.top] == [three.token_id, 8]
    for row, one in ((11, five), (6, two), (8, three)):
        assert [p for _, p in one.top] == pytest.approx([float(want[row, i]) for i, _ in one.top], abs=1e-4)
