"""An index elsewhere, fed by news alone, is the cache: through hits, evictions, faults, and readers that come late.

Mutants seen to fail: `lost` not told; no `anew`; `take` forgetting what it left over; no bound on what is unread.
"""

from __future__ import annotations

import random

import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB

from router.dispatch.prefixes import PrefixIndex, prompt_hashes
from workers.api.hashing import SHORT_BYTES, prompt_salt
from workers.engine.cache_journal import CacheJournal


def held_by(harness: Harness) -> set[bytes]:
    return {digest[:SHORT_BYTES] for digest in harness.engine.roster.cache._block_of}


def read(harness: Harness, index: PrefixIndex, most: int = 1000) -> None:
    news = harness.engine.cache_news(most)
    if news is not None:
        index.take(news)


@pytest.mark.parametrize("seed", range(4))
def test_the_index_follows_the_cache_step_by_step(seed: int) -> None:
    rng = random.Random(seed)
    harness, index = Harness(num_blocks=24), PrefixIndex(24)
    evicted = 0
    for number in range(40):
        start = [rng.randrange(4)] * rng.randrange(1, 20)
        harness.submit(request(f"r{number}", [*start, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30)))], 6))
        for _ in range(rng.randrange(1, 12)):
            before = len(index)
            if harness.engine.has_work:
                harness.step()
            read(harness, index)
            assert index._held == held_by(harness)
            evicted += len(index) < before
    harness.drain()
    assert evicted


def test_news_in_small_batches_tell_the_same_in_the_end() -> None:
    harness, index = Harness(), PrefixIndex(64)
    read(harness, index)
    harness.submit(request("r", range(50), 4))
    harness.drain()
    for rest in range(12, -1, -1):
        read(harness, index, most=1)
        assert len(held_by(harness) - index._held) == rest
    assert harness.engine.cache_news(1) is None


def test_a_late_reader_is_told_everything() -> None:
    harness = Harness(num_blocks=16)
    early, late = PrefixIndex(16), PrefixIndex(16)
    read(harness, early)
    for number in range(3):
        harness.submit(request(f"r{number}", [number] * 30, 4))
        harness.drain()
    harness.engine.tell_cache_anew()
    news = harness.engine.cache_news(1000)
    assert news is not None
    assert news.anew
    for index in (early, late):
        index.take(news)
        assert index._held == held_by(harness)


def test_what_nobody_reads_does_not_grow() -> None:
    held: set[bytes] = set()
    journal = CacheJournal(lambda: held, most_unread=10)
    journal.gained(b"before the first reader")
    assert not journal._changes
    journal.take(10)
    for number in range(100):
        held.add(number.to_bytes(16, "big"))
        journal.gained(number.to_bytes(16, "big"))
        assert len(journal._changes) <= 10
    news = journal.take(1000)
    assert news is not None
    assert news.anew
    assert len(news.gained) == 100 * SHORT_BYTES


@pytest.mark.parametrize("apart_from", [None, 10, 35, 36])
@pytest.mark.parametrize("known", [4, 5, 16, 17, 33, 36, 37])
async def test_the_index_predicts_what_the_engine_finds(known: int, apart_from: int | None) -> None:
    harness, index = Harness(prompts_apart_from=apart_from), PrefixIndex(64)
    prompt = [i * 7 % VOCAB for i in range(36)]
    harness.submit(request("warm", prompt, 1, salt=b"anna"))
    harness.drain()
    read(harness, index)
    asked = [*prompt, 1, 2, 3][:known]
    anna, bob = (prompt_salt(salt, len(asked), apart_from) for salt in (b"anna", b"bob"))
    predicted = index.cached(await prompt_hashes(asked, 4, salt=anna))
    stranger = index.cached(await prompt_hashes(asked, 4, salt=bob))
    harness.submit(request("hit", asked, 1, salt=b"anna"))
    harness.drain()
    assert predicted == harness.receiver.last["hit"].cached_tokens
    assert stranger == 0
