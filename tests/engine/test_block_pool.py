"""Blocks: every one in one state, references counted, the longest idle evicted first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.block_pool import BlockPool


def test_a_block_is_taken_shared_and_given_back() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.share(block)
    pool.release([block])
    assert pool.refs(block) == 1
    assert pool.num_available == 1
    pool.release([block])
    assert pool.num_available == 2
    pool.check({})


def test_no_block_is_left() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(ValueError, match="all 1 blocks are held"):
        pool.take()


def test_releasing_too_often_is_refused() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.release([block])
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release([block])


def test_the_longest_idle_is_evicted_and_only_when_none_is_free() -> None:
    pool = BlockPool(3)
    evicted: list[int] = []
    pool.on_evict.append(evicted.append)
    first, second, third = pool.take(), pool.take(), pool.take()
    pool.keep(first)
    pool.keep(second)
    pool.release([second])
    pool.release([first])
    pool.release([third])
    assert pool.take() == third
    assert evicted == []
    assert pool.take() == second
    assert pool.take() == first
    assert evicted == [second, first]


def test_a_hit_saves_an_idle_block_from_eviction() -> None:
    pool = BlockPool(2)
    a, b = pool.take(), pool.take()
    pool.keep(a)
    pool.keep(b)
    pool.release([a, b])
    pool.share(a)
    assert pool.take() == b
    pool.check({a: 1, b: 1})


def test_a_dropped_block_is_free_at_once_or_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2)
    a, b = pool.take(), pool.take()
    pool.keep(a)
    pool.keep(b)
    pool.release([a])
    pool.drop(a)
    pool.drop(b)
    assert pool.num_idle == 0
    pool.release([b])
    assert pool.num_idle == 0
    pool.check({})


def test_the_check_notices_a_lost_block_and_a_wrong_count() -> None:
    pool = BlockPool(2)
    block = pool.take()
    with pytest.raises(AssertionError, match="no holder"):
        pool.check({})
    with pytest.raises(AssertionError, match="differ"):
        pool.check({block: 2})
    pool._free.append(block)
    with pytest.raises(AssertionError, match="in two of"):
        pool.check({block: 1})
    pool._free.clear()
    with pytest.raises(AssertionError, match="= 1, not 2"):
        pool.check({block: 1})


operations = st.lists(st.tuples(st.sampled_from(["take", "share", "release", "keep", "drop"]), st.integers(0, 10**6)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num_blocks=st.integers(1, 6), steps=operations)
def test_random_operations_equal_a_naive_model(num_blocks: int, steps: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks)
    evicted: list[int] = []
    pool.on_evict.append(evicted.append)
    held: Counter[int] = Counter()
    kept: set[int] = set()
    idle: list[int] = []
    for what, number in steps:
        evicted.clear()
        reachable = sorted({*held, *idle})
        if what == "take" and pool.num_available:
            block = pool.take()
            if len(held) + len(idle) == num_blocks:
                assert [block] == evicted == idle[:1]
                idle.pop(0)
                kept.discard(block)
            else:
                assert block not in held
                assert block not in idle
            held[block] = 1
        elif what == "share" and reachable:
            block = reachable[number % len(reachable)]
            pool.share(block)
            held[block] += 1
            if block in idle:
                idle.remove(block)
        elif what == "release" and held:
            block = sorted(held)[number % len(held)]
            pool.release([block])
            held[block] -= 1
            if not held[block]:
                del held[block]
                if block in kept:
                    idle.append(block)
        elif what == "keep" and held:
            block = sorted(held)[number % len(held)]
            pool.keep(block)
            kept.add(block)
        elif what == "drop" and kept:
            block = sorted(kept)[number % len(kept)]
            pool.drop(block)
            assert evicted == [block]
            kept.discard(block)
            if block in idle:
                idle.remove(block)
        pool.check(dict(held))
        assert pool.num_available == num_blocks - len(held)
        assert pool.kept == kept
        assert pool.num_idle == len(idle)
