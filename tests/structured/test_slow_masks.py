"""A mask that takes long holds up nobody but its own sequence, and changes no token."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Tokens
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from one_process import demo_engine
from structured_asks import OBJECT, WORDS, ask

from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import FinishReason
from workers.engine.core import Engine
from workers.engine.grammar_state import GrammarState
from workers.rank import run_to_completion

Rows = Tokens[tuple[GrammarState, Tokens[int]]]

ENDLESS = GrammarSpec(GrammarKind.REGEX, "([a-z]{2,9} )*")
CONFIGS: dict[str, dict[str, Any]] = {
    "ahead": {},
    "not ahead": {"step_ahead": False},
    "preempted": {"num_blocks": 26, "prefix_caching": False},
    "in pieces": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
}


def requests() -> list[Any]:
    """Plain ones and others; some end by their limit, some by their grammar."""
    specs = [None, OBJECT, WORDS, ENDLESS, None, ENDLESS]
    return [ask(f"r{i}", specs[i % 6], max_tokens=(24, 40)[i % 2], temperature=0.8 * (i % 3 > 0)) for i in range(12)]


def with_slow_masks(engine: Engine, seed: int) -> dict[str, list[int]]:
    """The answers where every fourth time, or so, masks take longer than any step waits."""
    assert engine.grammars is not None
    random, masks = Random(seed), engine.grammars.masks

    def slow(rows: Rows) -> list[bytes]:
        if random.random() < 0.25:
            time.sleep(0.02)
        return masks(rows)

    with patch.object(engine.grammars, "masks", slow), patch("workers.engine.core._PATIENCE", 0.05):
        return run_to_completion(engine, requests())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_slow_masks_change_no_token(name: str) -> None:
    with demo_engine(threaded=False, **CONFIGS[name]) as engine:
        expected = run_to_completion(engine, requests())
        before = engine.stats.put_off
        assert with_slow_masks(engine, seed=1) == expected
        stats = engine.stats
        assert stats.put_off > before
        assert stats.executed == stats.prefill + stats.decode + stats.overhead
        assert stats.overhead >= stats.put_off
        engine.check_ledgers()


def test_others_go_on_while_one_waits_for_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waits = threading.Event(), threading.Event()
    monkeypatch.setattr(GrammarState, "guess", lambda self, *_: setattr(self, "is_slow", self.spec is WORDS))
    with demo_engine(threaded=False) as engine:
        assert engine.grammars is not None
        masks = engine.grammars.masks

        def gated(rows: Rows) -> list[bytes]:
            if any(state.count >= 5 and state.spec is WORDS for state, _ in rows):
                waits.set()
                gate.wait(60)
            return masks(rows)

        alone = run_to_completion(engine, [ask("slow", WORDS)])["slow"]
        got: dict[str, list[int]] = {"slow": [], "plain": [], "other": []}
        with patch.object(engine.grammars, "masks", gated):
            engine.submit(ask("slow", WORDS))
            engine.submit(ask("plain", None, stop_ids=()))
            engine.submit(ask("other", ENDLESS, max_tokens=60))
            while engine.has_work:
                for delta in engine.step():
                    got[delta.request_id] += delta.token_ids
                engine.check_ledgers()
                if min(len(got["plain"]), len(got["other"])) >= 50 and not gate.is_set():
                    assert waits.is_set()
                    assert len(got["slow"]) == 6
                    gate.set()
        assert got["slow"] == alone


def test_who_is_aborted_while_his_mask_is_under_way_leaves_nothing() -> None:
    gate = threading.Event()
    with demo_engine(threaded=False) as engine:
        assert engine.grammars is not None
        masks = engine.grammars.masks

        def gated(rows: Rows) -> list[bytes]:
            if any(state.count >= 3 for state, _ in rows):
                gate.wait(60)
            return masks(rows)

        with patch.object(engine.grammars, "masks", gated):
            engine.submit(ask("slow", WORDS))
            engine.submit(ask("plain", None, max_tokens=12, stop_ids=()))
            while not engine.stats.put_off:
                engine.step()
            engine.abort("slow")
            ends = {d.request_id: d.finish for _ in range(3) for d in engine.step() if d.finish is not None}
            assert ends["slow"] is FinishReason.ABORT
            gate.set()
            while engine.has_work:
                engine.step()
        engine.check_ledgers()


def test_a_mask_that_cannot_be_computed_ends_its_request_alone() -> None:
    with demo_engine(threaded=False) as engine:
        assert engine.grammars is not None
        finish = engine.grammars._finish

        def broken(row: memoryview, state: GrammarState) -> None:
            if state.count >= 4 and state.spec is WORDS:
                raise RuntimeError("no such mask")
            finish(row, state)

        with patch.object(engine.grammars, "_finish", broken):
            engine.submit(ask("bad", WORDS))
            engine.submit(ask("good", OBJECT))
            ends = {}
            while engine.has_work:
                ends |= {d.request_id: d for d in engine.step() if d.finish is not None}
        assert ends["bad"].finish is FinishReason.ERROR
        assert "no such mask" in (ends["bad"].error or "")
        assert ends["good"].finish is FinishReason.STOP
        engine.check_ledgers()
