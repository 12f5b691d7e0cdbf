"""Log-probabilities of prompts against transformers: in chunks, beside others, preempted, cached, on two ranks."""

from __future__ import annotations

import pytest
import torch
from demo_reference import FOLDER, model
from thread_ranks import on_ranks
from tiny import added, prompt, rank_of, reference, replica, request, run

from workers.api.request import Delta, EngineRequest, TokenLogprobs
from workers.engine.core import Engine
from workers.engine.plan import PromptLogprobs, StepPlan
from workers.engine.sequence import Sequence
from workers.execution import passes
from workers.parallel.group import Groups
from workers.rank import Rank

TOP = 3


def check(got: tuple[TokenLogprobs, ...], ids: tuple[int, ...], of: torch.nn.Module, top: int = TOP) -> None:
    """`got` is what `of` says of all tokens of `ids` but the first."""
    with torch.inference_mode():
        want = of(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert [one.token_id for one in got] == list(ids[1:])
    for row, one in zip(want, got, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert one.rank == int((row > row[one.token_id]).sum()) + 1
        values, tokens = row.topk(top)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


def serve(engine: Engine, asked: list[EngineRequest]) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {one.id: [] for one in asked}
    for one in asked:
        engine.submit(one)
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id].append(delta)
    engine.check_ledgers()
    return found


def scored(name: str, ids: tuple[int, ...], **sampling: int) -> EngineRequest:
    return request(name, ids, **{"prompt_logprobs": TOP, "max_tokens": 3, **sampling})


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 32}, {"step_ahead": False, "block_size": 8}])
def test_prompts_cut_in_any_way_beside_requests_that_ask_for_nothing(limits: dict[str, int]) -> None:
    engine = rank_of("llama", **limits).make_engine()
    prompts = [prompt(n) for n in (1, 2, 17, 75, 33)]
    found = serve(engine, [*(scored(str(i), ids) for i, ids in enumerate(prompts)), request("plain", prompt(40, 7))])
    for i, ids in enumerate(prompts):
        first, *rest = found[str(i)]
        check(first.prompt_logprobs, ids, reference("llama"))
        assert not any(delta.prompt_logprobs for delta in rest)
    assert not any(delta.prompt_logprobs for delta in found["plain"])


def test_more_rows_than_logits_are_made_of_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.execution import prompt_scores

    monkeypatch.setattr(prompt_scores, "SCORED_ROWS", 10)
    found = serve(rank_of("llama").make_engine(), [scored("a", prompt(44), prompt_logprobs=0)])
    check(found["a"][0].prompt_logprobs, prompt(44), reference("llama"), top=0)


def test_nothing_of_such_a_prompt_is_taken_from_the_cache_but_others_find_it_there() -> None:
    engine = rank_of("llama").make_engine()
    ids = prompt(50)
    for name in ("first", "second"):
        deltas = serve(engine, [scored(name, ids)])[name]
        check(deltas[0].prompt_logprobs, ids, reference("llama"))
        assert (deltas[-1].cached_tokens, deltas[-1].executed_prefill) == (0, 50)
    assert serve(engine, [request("plain", ids)])["plain"][-1].cached_tokens == 48


def test_preempted_requests_get_each_log_probability_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of("llama", num_blocks=9, block_size=8, max_num_batched_tokens=8, max_num_seqs=4)
    engine = Engine(rank.config.engine, rank.runner, num_blocks=9, max_model_len=72, watermark=0)
    prompts = [prompt(20, seed=i) for i in range(5)]
    known, preempt = [], engine.roster.preempt

    def noted(sequence: Sequence) -> None:
        known.append(sequence.prompt_logprobs)
        preempt(sequence)

    monkeypatch.setattr(engine.roster, "preempt", noted)
    found = serve(engine, [scored(str(i), ids, max_tokens=24) for i, ids in enumerate(prompts)])
    assert None in known  # after its prompt, and
    assert any(known)  # in the middle of it
    for i, ids in enumerate(prompts):
        given = [delta.prompt_logprobs for delta in found[str(i)] if delta.prompt_logprobs]
        assert len(given) == 1
        check(given[0], ids, reference("llama"))


def test_a_replay_does_not_score_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scored("a", prompt(20))
    again = EngineRequest("b", asked.prompt_ids, asked.sampling, resumed_ids=(5,))
    engine = rank_of("llama").make_engine()
    assert serve(engine, [asked])["a"][0].prompt_logprobs
    monkeypatch.delattr(passes, "score_prompts")  # it would be missed
    deltas = serve(engine, [again])["b"]
    assert sum(len(delta.token_ids) for delta in deltas) == 2
    assert not any(delta.prompt_logprobs for delta in deltas)


def test_two_ranks_score_what_one_does() -> None:
    ids = prompt(30)

    def work(number: int, groups: Groups) -> list[PromptLogprobs]:
        own = rank_of("llama", rank=number, groups=groups, num_blocks=8).runner
        new = added(1, ids, (3, 5), prompt_logprobs=TOP)
        plans = [
            StepPlan(1, (), (new,), (run(1, 0, 12, emit=0),)),
            StepPlan(2, (), (), (run(1, 12, 1, emit=0),)),
            StepPlan(3, (), (), (run(1, 13, 17),)),
        ]
        return [one for plan in plans for one in own.submit(plan).result().prompts]

    first, other = on_ranks(2, work)
    assert [(one.slot, one.start) for one in first] == [(1, 1), (1, 13), (1, 14)]
    check(tuple(token for one in first for token in one.logprobs), ids, reference("llama"))
    assert not other  # one rank tells


def test_the_demo_model_finds_its_own_sentences_likely() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    texts = ["The capital of France is Paris.", "Paris France The capital is of."]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    engine = Rank(replica(FOLDER)).make_engine()
    found = serve(engine, [scored(str(i), ids) for i, ids in enumerate(prompts)])
    losses = []
    for i, ids in enumerate(prompts):
        given = found[str(i)][0].prompt_logprobs
        check(given, ids, model())
        losses.append(-sum(one.logprob for one in given) / len(given))
    assert losses[0] < losses[1]
