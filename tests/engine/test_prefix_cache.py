"""Prefix hits: what is found, what must not be, and that a block is hashed once."""

from __future__ import annotations

import random

import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB, oracle

import workers.engine.prefix_cache
from workers.api.hashing import block_hashes
from workers.api.request import Delta, FinishReason

PROMPT = [i * 7 % VOCAB for i in range(16)]


def run(harness: Harness, *asked: object) -> dict[str, Delta]:
    harness.submit(*asked)  # type: ignore[arg-type]
    harness.drain()
    return harness.receiver.last


@pytest.mark.parametrize(
    ("known", "found"),
    [(16, 12), (17, 16), (4, 0), (5, 4), (13, 12)],
)
def test_a_hit_is_of_full_blocks_and_never_the_whole_prompt(known: int, found: int) -> None:
    harness = Harness()
    run(harness, request("warm", [*PROMPT, 1, 2, 3], 1))
    prompt = [*PROMPT, 1, 2, 3][:known]
    last = run(harness, request("hit", prompt, 3))["hit"]
    assert last.cached_tokens == found
    assert last.executed_prefill == known - found
    assert last.executed_decode == 2


def test_a_prefix_that_many_bring_at_once_is_computed_once() -> None:
    """Also in the step that computes it, and also where that takes several steps."""
    for budget in (256, 20):
        harness = Harness(max_num_batched_tokens=budget)
        asked = [request(str(i), [*PROMPT, 40 + i], 3) for i in range(5)]
        last = run(harness, *asked)
        assert [last[r.id].cached_tokens for r in asked] == [0, 16, 16, 16, 16]
        assert sum(last[r.id].executed_prefill for r in asked) == 16 + 5
        if budget == 256:
            assert len(harness.executor.plans[0].scheduled) == 5
        for r in asked:
            assert harness.receiver.tokens[r.id] == oracle(r, 128)[0]


def test_what_was_planned_may_be_hit_after_its_sequence_has_left() -> None:
    harness = Harness()
    harness.submit(request("gone", [*PROMPT, 1, 2], 8))
    harness.step()
    harness.engine.abort("gone")
    last = run(harness, request("next", [*PROMPT, 3, 4], 2))["next"]
    assert last.cached_tokens == 16


def test_emitted_tokens_are_found_by_the_next_turn() -> None:
    harness = Harness()
    run(harness, request("turn 1", PROMPT, 9))
    answer = harness.receiver.tokens["turn 1"]
    last = run(harness, request("turn 2", [*PROMPT, *answer, 5, 6], 1))["turn 2"]
    assert last.cached_tokens == 24  # the last token of the answer was never run


def test_emitted_tokens_are_found_while_the_sequence_still_runs() -> None:
    harness = Harness()
    first = request("first", PROMPT, 60)
    harness.submit(first)
    for _ in range(14):
        harness.step()
    answer = harness.receiver.tokens["first"]
    assert len(answer) == 13
    harness.submit(request("second", [*PROMPT, *answer], 1))
    harness.drain()
    assert harness.receiver.last["second"].cached_tokens == 28
    assert harness.receiver.tokens["first"] == oracle(first, 128)[0]


@pytest.mark.parametrize("other", [{"salt": b"b"}, {"salt": b""}])
def test_owners_with_other_salts_share_nothing(other: dict[str, bytes]) -> None:
    harness = Harness()
    run(harness, request("a", PROMPT, 1, salt=b"a"))
    assert run(harness, request("b", PROMPT, 1, **other))["b"].cached_tokens == 0
    assert run(harness, request("c", PROMPT, 1, salt=b"a"))["c"].cached_tokens == 12


def test_switched_off_nothing_is_found_or_kept() -> None:
    harness = Harness(prefix_caching=False)
    run(harness, request("a", PROMPT, 1))
    assert run(harness, request("b", PROMPT, 1))["b"].cached_tokens == 0
    assert harness.engine.roster.pool.num_idle == 0
    assert harness.engine.load().prefix_queries == 0
    assert harness.engine.load().prefix_hits == 0


def test_the_tail_is_evicted_before_the_prefix() -> None:
    harness = Harness(num_blocks=8, max_num_batched_tokens=32)
    run(harness, request("a", PROMPT, 1))  # 4 blocks idle, 4 free
    run(harness, request("b", [63] * 19, 1))  # 5 blocks: one is evicted
    assert run(harness, request("c", [*PROMPT, 1], 1))["c"].cached_tokens == 12


def test_hashes_are_those_of_the_shared_rule() -> None:
    harness = Harness()
    run(harness, request("a", PROMPT, 6, salt=b"s"))
    tokens = PROMPT + harness.receiver.tokens["a"]
    expected = block_hashes(tokens[:-1], harness.block_size, salt=b"s")
    assert set(harness.engine.roster.cache._block_of) == set(expected)


def test_each_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0
    extend = workers.engine.prefix_cache.extend_hash

    def count(*args: object) -> bytes:
        nonlocal hashed
        hashed += 1
        return extend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(workers.engine.prefix_cache, "extend_hash", count)
    harness = Harness(num_blocks=12, watermark=0, max_num_seqs=4)
    rng = random.Random(1)
    asked = [request(str(i), [rng.randrange(VOCAB) for _ in range(9)], 20, seed=i) for i in range(6)]
    run(harness, *asked)
    assert harness.engine.stats.preemptions > 0
    assert hashed <= sum((9 + 20) // harness.block_size for _ in asked)


def test_what_a_faulty_request_has_computed_is_not_hit() -> None:
    harness = Harness(fault=lambda seed, position: seed == 9)
    first = run(harness, request("bad", PROMPT, 4, seed=9))["bad"]
    assert first.finish is FinishReason.ERROR
    good = request("good", PROMPT, 4)
    last = run(harness, good)["good"]
    assert last.cached_tokens == 0
    assert harness.receiver.tokens["good"] == oracle(good, 128)[0]


def test_clear_forgets_everything() -> None:
    harness = Harness()
    run(harness, request("a", PROMPT, 1))
    assert len(harness.engine.roster.cache) == 4
    harness.engine.roster.cache.clear()
    harness.engine.check_ledgers()
    assert run(harness, request("b", PROMPT, 1))["b"].cached_tokens == 0
