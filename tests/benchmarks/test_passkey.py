"""Passkey retrieval: prompts are as long as asked for, the key stands at its depth, and the demo model finds it."""

from __future__ import annotations

from random import Random

import pytest
from load.engine_target import tokenizer_of
from passkey import load, make_prompt, measure, parsed


@pytest.mark.parametrize("story", ["name", "key"])
def test_prompts_have_their_length_and_the_key_at_its_depth(story: str) -> None:
    tokenizer = tokenizer_of("demo")
    for length, depth in ((200, 0.0), (400, 0.5), (400, 1.0)):
        ids, key = make_prompt(tokenizer, story, length, depth, Random(3))
        text = tokenizer.decode(ids)
        assert length - 60 < len(ids) <= length
        assert abs(text.index(key) / len(text) - depth) < 0.2


def test_the_demo_model_remembers_a_name() -> None:
    args = parsed(["--lengths", "120", "--depths", "0", "1", "--trials", "3", "--threads", "1"])
    (row,) = measure(load(args), tokenizer_of("demo"), args)
    assert row["right_by_depth"] == {0.0: 1.0, 1.0: 1.0}
