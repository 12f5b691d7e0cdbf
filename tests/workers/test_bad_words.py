"""Bad words: sequences of tokens that no answer holds, whatever else runs, and however it came to be run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB, prompt, rank_of, reference, request

from workers.api.errors import InvalidRequest
from workers.engine.stop import validate
from workers.rank import run_to_completion

Words = tuple[tuple[int, ...], ...]
COUNT = 9


def ends_a_word(ids: list[int], words: Words) -> set[int]:
    """Ids that would complete a word after `ids`."""
    return {w[-1] for w in words if tuple(ids[len(ids) - len(w) + 1 :]) == w[:-1] and len(w) <= len(ids) + 1}


@torch.inference_mode()
def greedy(ids: tuple[int, ...], words: Words) -> list[int]:
    """transformers' most likely tokens, one after the other, of those that complete no word."""
    answer: list[int] = []
    for _ in range(COUNT):
        logits = reference("llama")(torch.tensor([[*ids, *answer]])).logits[0, -1]
        for token in ends_a_word(answer, words):
            logits[token] = -torch.inf
        answer.append(int(logits.argmax()))
    return answer


def holds(answer: list[int], words: Words) -> bool:
    return any(tuple(answer[i : i + len(w)]) == w for w in words for i in range(len(answer)))


def words_against(ids: tuple[int, ...]) -> Words:
    """Words of one, two and three tokens; each but the first stands in the answer that those before it leave."""
    words: Words = ((VOCAB - 1, 7),)
    for length, at in ((2, 1), (1, 3), (3, 2)):
        answer = greedy(ids, words)
        words = (*words, tuple(answer[at : at + length]))
    return words


def test_greedy_answers_are_those_of_transformers_without_the_words() -> None:
    prompts = [prompt(n, seed=5) for n in (3, 40)]
    words = [words_against(ids) for ids in prompts]
    wanted = {str(i): greedy(ids, w) for i, (ids, w) in enumerate(zip(prompts, words, strict=True))}
    assert not any(holds(wanted[k], words[int(k)]) for k in wanted)
    asked = [request(str(i), ids, max_tokens=COUNT, bad_words=words[i]) for i, ids in enumerate(prompts)]
    plain = request("plain", prompts[1], max_tokens=COUNT)
    together = run_to_completion(rank_of("llama").make_engine(), [*asked, plain])
    assert {k: together[k] for k in wanted} == wanted
    assert holds(together["plain"], words[1])
    cramped = rank_of("llama", max_num_batched_tokens=32, num_blocks=10, block_size=8).make_engine()
    assert run_to_completion(cramped, [*asked, plain]) == together
    cuts = range(1, 6)  # replays in the middle of any word
    resumed = [
        type(asked[1])(str(cut), prompts[1], asked[1].sampling, resumed_ids=tuple(wanted["1"][:cut])) for cut in cuts
    ]
    answers = run_to_completion(rank_of("llama").make_engine(), resumed)
    assert answers == {str(cut): wanted["1"][cut:] for cut in cuts}


def test_the_prompt_is_not_part_of_what_is_emitted() -> None:
    ids = prompt(9, seed=6)
    first = greedy(ids, ())[0]
    word = (ids[-1], first)
    answer = run_to_completion(rank_of("llama").make_engine(), [request("a", ids, max_tokens=4, bad_words=(word,))])
    assert answer["a"][0] == first


def test_sampled_answers_hold_none_and_are_drawn_as_before_where_none_would_end() -> None:
    ids = prompt(12, seed=7)
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 12}
    free = run_to_completion(rank_of("llama").make_engine(), [request("a", ids, **drawn)])["a"]
    word = (free[6], free[7])
    without = run_to_completion(rank_of("llama").make_engine(), [request("a", ids, **drawn, bad_words=(word,))])["a"]
    at = next(i for i in range(len(free)) if tuple(free[i : i + 2]) == word)
    assert without[: at + 1] == free[: at + 1]
    assert not holds(without, (word,))


@pytest.mark.parametrize("words", [((),), ((VOCAB,),), ((1, -1),)], ids=str)
def test_words_that_are_refused(words: Words) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(request("a", (1,), bad_words=words), 64, VOCAB)
    assert refused.value.param == "bad_words"
