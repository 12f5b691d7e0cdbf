"""The demo model through every Triton kernel: the tokens of transformers, and those of the references when sampled."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kernels

sys.path.append(str(Path(__file__).parents[2] / "workers"))  # the demo model's prompts

from demo_reference import EOS, FOLDER, answers, prompts
from demo_requests import VARIED, Answer, differing, greedy, sampled, serve, serve_alone
from tiny import replica

from kernels.backend import INTERPRETED
from workers.api.request import FinishReason
from workers.rank import Rank

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a device, tests/gpu does this")

TOKENS = 8
GREEDY = [i for i, ids in enumerate(prompts()) if len(ids) <= 16 and len(answers()[i]) >= TOKENS][:6]


def make_rank() -> Rank:
    return Rank(replica(FOLDER, max_num_batched_tokens=24, max_num_seqs=8, cache_bytes_cpu=32 << 20))


@pytest.fixture(scope="module")
def rank() -> Rank:
    """Prefills and decodes share its steps. On the CPU, with a CUDA device too."""
    return make_rank()


def modules() -> list[Any]:
    """All are imported before one is changed: they import from each other."""
    return [importlib.import_module(found.name) for found in pkgutil.iter_modules(kernels.__path__, "kernels.")]


@contextmanager
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launcher that falls back to its reference fails."""

    def refuse(name: str) -> Callable[..., Any]:
        def fail(*args: object, **keywords: object) -> None:
            raise AssertionError(f"{name} was called, its kernel was not")

        return fail

    with monkeypatch.context() as patch:
        for module in modules():
            for name in vars(module):
                if name.endswith("_reference"):
                    patch.setattr(module, name, refuse(name))
        yield


@contextmanager
def only_references(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in modules():
            if hasattr(module, "use_triton"):
                patch.setattr(module, "use_triton", lambda tensor: False)
        yield


def first(index: int) -> Answer:
    tokens = answers()[index][:TOKENS]
    return Answer(tokens, finish=FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH)


def test_6_prompts_of_8_tokens_give_the_tokens_of_transformers(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_kernels(monkeypatch):
        got = serve(rank.make_engine(), [greedy(i, TOKENS) for i in GREEDY])
    assert differing(got, {f"g{i}": first(i) for i in GREEDY}) == {}


def test_sampled_tokens_are_those_of_the_references(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt, so that the prefill is shared; parameters of several kinds."""
    asked = [replace(sampled(i, 3), prompt_ids=prompts()[GREEDY[0]]) for i in range(3, 3 * len(VARIED), 6)]
    engine = rank.make_engine()
    got = serve_alone(engine, asked[:1]) | serve(engine, asked[1:])
    with only_references(monkeypatch):
        expected = serve(make_rank().make_engine(), asked)
    assert differing(got, expected) == {}
    assert len({tuple(one.tokens) for one in got.values()}) > 1
