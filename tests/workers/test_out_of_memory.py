"""A step for which there is no memory is run in parts: the same tokens, and one request's need is its own affair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import added, prompt, rank_of, request, run

from workers.api.errors import OutOfMemory
from workers.api.request import EngineRequest, FinishReason, TokenLogprobs
from workers.engine.plan import ScheduledSequence, StepPlan
from workers.execution.halving import halves, independent_order, is_out_of_memory
from workers.execution.passes import Passes
from workers.rank import run_to_completion

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"
HEAVY = 299  # a token that no memory is enough for


def planted() -> Exception:
    return torch.cuda.OutOfMemoryError(MESSAGE)


class Limited:
    """A model that runs a whole step and then has no memory, if there are over `most` tokens or a heavy one.

    `seen` are the numbers of tokens that were tried.
    """

    def __init__(self, model: Any, most: int, error: Callable[[], Exception] = planted) -> None:
        self._model, self._most, self._error = model, most, error
        self.seen: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(ids))
        hidden: torch.Tensor = self._model(ids, positions)
        if len(ids) > self._most or bool((ids == HEAVY).any()):
            raise self._error()
        return hidden


def requests() -> list[EngineRequest]:
    """Prompts of several lengths, greedy and drawn; three share a block, one has but a token more."""
    shared = prompt(16, seed=50)
    prompts = [prompt(5), prompt(19), (*shared, *prompt(9, seed=51)), (*shared, 7), (*shared, *prompt(20, seed=52))]
    return [
        request(str(i), ids, max_tokens=4, temperature=0.0 if i % 2 else 0.8, seed=i, logprobs=1 if i % 3 else None)
        for i, ids in enumerate(prompts)
    ]


@pytest.mark.parametrize("most", [4, 25])
def test_the_tokens_are_those_of_a_step_with_memory(most: int, caplog: pytest.LogCaptureFixture) -> None:
    rank = rank_of("llama", threaded=most == 4, max_num_batched_tokens=60)
    expected = run_to_completion(rank.make_engine(), requests())
    for cache in rank.runner.caches:  # or blocks that are read too early would hold what the first run left there
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    limited = Limited(rank.model, most)
    rank.runner.passes.model = limited  # type: ignore[assignment]
    engine = rank.make_engine()
    assert run_to_completion(engine, requests()) == expected
    engine.check_ledgers()
    assert engine.stats.steps_cut == engine.load().steps_cut == sum("runs in halves" in m for m in caplog.messages) > 0
    assert max(limited.seen) > most
    assert engine.stats.failed == 0
    rank.close()


def test_log_probabilities_of_a_prompt_are_put_together() -> None:
    rank = rank_of("llama")
    asked = [request(name, prompt(n), max_tokens=2, prompt_logprobs=1) for name, n in (("a", 21), ("b", 6))]

    def told() -> dict[str, list[TokenLogprobs | None]]:
        engine, found = rank.make_engine(), {}
        for one in asked:
            engine.submit(one)
        while engine.has_work:
            found.update({d.request_id: list(d.prompt_logprobs) for d in engine.step() if d.prompt_logprobs})
        return found

    whole = told()
    rank.runner.passes.model = Limited(rank.model, 4)  # type: ignore[assignment]
    for name, values in told().items():
        assert len(values) == len(whole[name])
        for got, expected in zip(values, whole[name], strict=True):
            assert (got is None) == (expected is None)
            if got is not None and expected is not None:
                assert (got.token_id, got.rank) == (expected.token_id, expected.rank)
                assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert sorted(whole) == ["a", "b"]


@pytest.mark.parametrize("chunk", [512, 12])
def test_a_request_that_finds_no_room_for_one_token_fails_alone(chunk: int) -> None:
    """In a prompt of one chunk, and in one whose last chunk would have been well."""
    rank = rank_of("llama", max_num_batched_tokens=chunk, max_num_seqs=12)
    good = [one for one in requests() if HEAVY not in one.prompt_ids]
    expected = run_to_completion(rank.make_engine(), good)
    rank.runner.passes.model = Limited(rank.model, 512)  # type: ignore[assignment]
    heavy = request("heavy", (*prompt(5, seed=90), HEAVY, *prompt(20, seed=91)), max_tokens=6)
    engine = rank.make_engine()
    got: dict[str, list[int]] = {one.id: [] for one in (*good, heavy)}
    ends = {}
    for one in (*good[:2], heavy, *good[2:]):
        engine.submit(one)
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
            if delta.finish is not None:
                ends[delta.request_id] = delta
    assert got == {**expected, "heavy": []}
    assert ends["heavy"].finish is FinishReason.ERROR
    assert f"out of memory for a single token: {MESSAGE}" in str(ends["heavy"].error)
    engine.check_ledgers()
    assert (engine.stats.failed, engine.stats.completed) == (1, len(good))
    # Its slot and its blocks are as good as any other.
    assert run_to_completion(engine, good) == expected


def test_who_shares_blocks_with_a_request_without_memory_does_not_take_them_for_keys() -> None:
    rank = rank_of("llama")
    shared = (*prompt(20, seed=90), HEAVY, *prompt(11, seed=91))
    rank.runner.passes.model = Limited(rank.model, 512)  # type: ignore[assignment]
    engine = rank.make_engine()
    first, second = (request(name, (*shared, tail), max_tokens=3) for name, tail in (("first", 5), ("second", 6)))
    engine.submit(first)
    engine.submit(second)
    errors = {d.request_id: str(d.error) for _ in range(8) for d in engine.step() if d.finish is FinishReason.ERROR}
    assert "out of memory" in errors["first"]
    assert "not finite" in errors["second"]
    engine.check_ledgers()


def test_several_ranks_must_run_the_same_so_none_cuts_a_step() -> None:
    rank = rank_of("llama")
    rank.runner.passes.careful = False
    rank.runner.passes.model = Limited(rank.model, 4)  # type: ignore[assignment]
    plan = StepPlan(3, (), (added(0, prompt(5)),), (run(0, 0, 5, blocks=(0,)),))
    with pytest.raises(OutOfMemory, match=r"step 3 .* out of memory.*max_num_batched_tokens"):
        rank.runner.submit(plan).result()


def test_other_errors_of_a_part_fail_the_step() -> None:
    rank = rank_of("llama")
    errors = iter([planted(), ZeroDivisionError()])
    rank.runner.passes.model = Limited(rank.model, 1, lambda: next(errors))  # type: ignore[assignment]
    plan = StepPlan(3, (), (added(0, prompt(5)),), (run(0, 0, 5, blocks=(0,)),))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        rank.runner.submit(plan).result()


def test_the_largest_step_is_tried_in_one_piece_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of("llama")

    def fail(*_: object) -> None:
        raise planted()

    monkeypatch.setattr(Passes, "_forward", fail)
    with pytest.raises(OutOfMemory):
        rank._profile()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (planted(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
    ids=["cuda", "host", "cpu-tensor", "driver", "triton", "other", "no-error-of-torch"],
)
def test_which_errors_are_meant(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def counts(runs: Any) -> list[tuple[int, int, int, int]]:
    return [(r.slot, r.start, r.count, r.emit) for r in runs]


def test_halves() -> None:
    one, long = ScheduledSequence(0, 9, 1, 1, (3,)), ScheduledSequence(1, 16, 7, 1)
    assert halves([one]) is None
    first, second = halves([long]) or ([], [])
    assert (counts(first), counts(second)) == ([(1, 16, 3, 0)], [(1, 19, 4, 1)])
    first, second = halves([one, long]) or ([], [])
    assert (counts(first), counts(second)) == ([(0, 9, 1, 1)], [(1, 16, 7, 1)])
    assert first[0].new_blocks == ()  # the tables have them
    first, second = halves([one, ScheduledSequence(2, 0, 1, 0)]) or ([], [])
    assert (counts(first), counts(second)) == ([(0, 9, 1, 1)], [(2, 0, 1, 0)])


def test_who_reads_a_block_comes_after_who_writes_it() -> None:
    """Slot 0 has hit block 5 of slot 2, which has hit block 7 of slot 3; slot 1 is for itself."""
    tables = np.array([[7, 5, 1, 0], [8, 9, 0, 0], [7, 5, 2, 0], [7, 6, 0, 0]], np.int32)
    runs = [
        ScheduledSequence(0, 32, 1, 1),
        ScheduledSequence(1, 16, 1, 1),
        ScheduledSequence(2, 16, 20, 1),
        ScheduledSequence(3, 0, 20, 1),
    ]
    assert [r.slot for r in independent_order(runs, tables, 16)] == [3, 2, 0, 1]
