"""Grammars over two ranks: the masks reach both, and the tokens are those of one rank."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import jsonschema
import pytest
import tokenizers
from gang_rank import DEMO, END, SCHEMA, WORDS, answers, config, main

from workers.rank import Rank


@pytest.mark.slow
def test_two_ranks_draw_what_one_does_under_masks(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=main, args=(number, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    alone, _ = answers(Rank(config(1)).make_engine())
    for process in processes:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    together, preemptions = json.loads((tmp_path / "answers").read_text())
    whole, resumed, preempted = together
    assert preemptions > 3
    assert whole == alone[0]
    assert resumed == whole
    assert preempted == whole
    text = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for name in ("object", "greedy"):
        jsonschema.validate(json.loads(text.decode(whole[name])), SCHEMA)
    assert re.fullmatch(WORDS.source, text.decode(whole["words"]))
    assert all(whole[name][-1] == END for name in ("object", "greedy", "words"))
