"""Plain streams beside grammars: the made-up tokenizer is one, and a pair has its figures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import structured
from llguidance import LLTokenizer
from made_tokenizer import END, SPECIALS, made_tokens, write_tokenizer
from structured_pairs import interval
from tokenizers import Tokenizer


def test_a_made_tokenizer_reads_and_writes_any_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, 6000)
    made = Tokenizer.from_file(str(path))
    text = '{"name": "\u00fcber\u4e2d\U0001f600", "n": [12, 345]}\n    x'
    ids = made.encode(text).ids
    assert made.decode(ids) == text
    assert len(ids) < len(text.encode())
    tokens = made_tokens(6000 - SPECIALS)
    assert len(set(tokens)) == len(tokens) == made.token_to_id("<|begin_of_text|>")
    seen = LLTokenizer(path.read_text())
    assert [seen.decode_bytes([i]) for i in range(len(tokens)) if tokens[i] != b"\xff"] == [
        token for token in tokens if token != b"\xff"
    ]
    assert seen.eos_tokens == [made.token_to_id(END)]


def test_a_pair_has_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--streams", "1", "--beside", "2", "--pairs", "2", "--tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["structured.py", "pairs", *few])
    structured.main()
    printed = capsys.readouterr().out
    for kind in ("free", "tight"):
        assert f"1 plain streams beside 2, grammar '{kind}', 12 tokens each, n=2 pairs" in printed
    assert len(re.findall(r"slower beside those with a grammar: median [+-]\d", printed)) == 2
    assert len(re.findall(r"waiting for a step's masks: p50 .* n=\d\d", printed)) == 2


def test_the_interval_of_a_median_holds_it() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0, 50.0])
    assert 1.0 <= low <= 3.0 <= high <= 50.0
    assert interval([2.0] * 5) == (2.0, 2.0)
