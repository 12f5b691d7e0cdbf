"""Cache affinity and load are one number: what is cached need not be computed, and that is all it is worth.

Mutants seen to fail: `uncached` giving the whole prompt; the most cached replica always first; hashes without the salt;
hashes of all prompts alike where the engine keeps long ones apart, or of prompts that it runs whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from router.dispatch.dispatcher import Dispatcher
from router.dispatch.lease import DISPATCH_CODEC, Acquire
from router.dispatch.prefixes import MOST_HASHES, PrefixIndex, PromptHashes, prompt_hashes
from router.dispatch.strategies import Strategy
from router.dispatch.table import Demand, Replica
from router.generation import GenerationRequest
from router.sessions import Sessions
from workers.api.hashing import SHORT_BYTES, block_hashes, prompt_salt
from workers.api.replica import CacheNews
from workers.api.request import SamplingParams

from .virtual import ask, info, made, replica_of
from .virtual_engine import Run, VirtualEngine

SHARED = list(range(16 * 240))  # 3,840 tokens that many prompts begin with


def news_of(token_ids: Sequence[int], **options: object) -> CacheNews:
    hashes = block_hashes(token_ids, 16, **options)  # type: ignore[arg-type]
    return CacheNews(b"".join(h[:SHORT_BYTES] for h in hashes))


async def test_what_is_cached_is_found_by_its_owner_and_to_the_block() -> None:
    index = PrefixIndex(1000)
    index.take(news_of(SHARED, salt=b"anna"))
    for length, cached in ((17, 16), (16, 0), (15, 0), (1000, 992), (5000, 3840)):
        prompt = [*SHARED, *[7] * 2000][:length]
        assert index.cached(await prompt_hashes(prompt, 16, salt=b"anna")) == cached
        assert index.cached(await prompt_hashes(prompt, 16, salt=b"bob")) == 0
        assert index.cached(await prompt_hashes(prompt, 16, salt=b"anna", adapter="a")) == 0


async def test_evicted_blocks_are_not_counted_and_a_new_beginning_forgets_all() -> None:
    index = PrefixIndex(1000)
    index.take(news_of(SHARED))
    told = news_of(SHARED).gained
    index.take(CacheNews(lost=told[100 * SHORT_BYTES :]))
    prompt = await prompt_hashes([*SHARED, 1], 16)
    assert index.cached(prompt) == 1600
    index.take(CacheNews(gained=told[: 3 * SHORT_BYTES], anew=True))
    assert index.cached(prompt) == 48


async def test_a_long_prompt_sends_a_bounded_number_of_hashes() -> None:
    index, tokens = PrefixIndex(100_000), [i % 1000 for i in range(100_001)]
    index.take(news_of(tokens))
    prompt = await prompt_hashes(tokens, 16)
    assert MOST_HASHES // 2 < len(prompt.digests) // SHORT_BYTES <= MOST_HASHES
    assert 100_000 - prompt.stride * 16 < index.cached(prompt) <= 100_000
    request = ask(prompt_hashes=prompt)
    assert DISPATCH_CODEC.decode(DISPATCH_CODEC.encode(request)[4:]) == request


async def test_a_front_asks_by_the_engines_rule() -> None:
    """Prompts of over 64 tokens share blocks with those of their own length; who wants log-probabilities, with none."""
    dispatcher: Any = SimpleNamespace(rows=[SimpleNamespace(info=replace(info("a"), prompts_apart_from=64))])
    links: Any = None
    sessions, index = Sessions(dispatcher, links), PrefixIndex(1000)
    for length in (64, 96):
        index.take(news_of(SHARED[:length], salt=prompt_salt(b"anna", length, 64)))

    async def cached(length: int, *, resumed: bool = False, **sampling: Any) -> int | None:
        drawn = (SamplingParams(max_tokens=1, **sampling),)
        asked = GenerationRequest("x", "m", tuple(SHARED[:length]), drawn, salt=b"anna")
        hashes = await sessions._hashes(asked, resumed=resumed)
        return None if hashes is None else index.cached(hashes)

    assert [await cached(length) for length in (16, 64, 65, 95, 96, 97)] == [None, 48, 0, 0, 80, 0]
    assert await cached(96, prompt_logprobs=0) is None
    assert await cached(96, prompt_logprobs=0, resumed=True) == 80


def test_an_index_is_no_larger_than_its_replicas_cache() -> None:
    index = PrefixIndex(10)
    index.take(news_of(SHARED))
    assert len(index) == 10


def site(names: str = "abcd") -> Dispatcher:
    d, _ = made()
    for name in names:
        d.replica_up(info(name, slots=64, blocks=10_000, context=100_000), speed=1000.0)
    return d


async def test_the_cached_replica_is_taken_and_its_backlog_counts_what_is_left() -> None:
    d = site()
    d.cache("c", news_of(SHARED))
    prompt = await prompt_hashes([*SHARED, *range(100)], 16)
    request = ask(prompt=3940, prompt_hashes=prompt)
    granted = d.acquire("i", request)
    assert replica_of(granted) == "c"
    assert granted.cached_tokens == 3840  # type: ignore[union-attr]
    assert d._registry.replicas["c"].unreported_tokens == 100


async def test_load_outweighs_a_hit() -> None:
    d = site("ab")
    d.cache("b", news_of(SHARED))
    prompt = await prompt_hashes([*SHARED, *range(100)], 16)
    assert replica_of(d.acquire("i", ask("long", prompt=20_000))) == "a"
    assert replica_of(d.acquire("i", ask("longer", prompt=40_000))) == "b"
    assert replica_of(d.acquire("i", ask(prompt=3940, prompt_hashes=prompt))) == "a"


async def test_hashes_of_another_block_size_are_no_hits() -> None:
    d = site("ab")
    d.cache("b", news_of(SHARED))
    prompt = PromptHashes(32, 1, (await prompt_hashes(SHARED, 16)).digests)
    assert d.acquire("i", ask(prompt=3940, prompt_hashes=prompt)).cached_tokens == 0  # type: ignore[union-attr]


class MostCached:
    """What a router does that looks at the cache first."""

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        return min(candidates, key=lambda r: (r.uncached(demand), r.slots))


async def spiral(strategy: Strategy | None, *, rate: float, requests: int) -> Run:
    """Requests that all begin alike, `rate` a second; only `a` has that beginning in its cache at first."""
    d, clock = made()
    if strategy is not None:
        d._granting._strategy = strategy
    warm = {"a"}

    def cached(engine: VirtualEngine, request: Acquire) -> int:
        if engine.name in warm:
            return len(SHARED)
        warm.add(engine.name)
        d.cache(engine.name, news_of(SHARED))
        return 0

    run = Run(d, clock, [VirtualEngine(name, per_seq=0.002) for name in "abcd"], cached=cached, slots=1000)
    d.cache("a", news_of(SHARED))
    rng, when = random.Random(0), clock.now
    for number in range(requests):
        when += rng.expovariate(rate)
        prompt = await prompt_hashes([*SHARED, number, *range(100)], 16)
        run.ask(when, ask(f"{number}", prompt=3941, prompt_hashes=prompt, max_tokens=40), 40)
    run.go(until=when + 100)
    assert d.ledger().balanced
    assert len(run.ttft) == requests
    return run


async def test_no_death_spiral_all_affine_traffic_does_not_sink_one_replica() -> None:
    """Affinity alone sends everything to `a`, whose decodes slow down more than a prefill elsewhere would cost."""
    affine = await spiral(MostCached(), rate=16.0, requests=150)
    run = await spiral(None, rate=16.0, requests=150)
    assert affine.taken["a"] == 150
    assert max(run.taken.values()) < 0.4 * 150
    assert max(run.most.values()) < 0.5 * max(affine.most.values())


async def test_little_affine_traffic_stays_where_it_is_cached() -> None:
    run = await spiral(None, rate=0.5, requests=15)
    assert run.taken["a"] >= 12
    assert max(run.taken[new] for new in "bcd") <= 1  # they were tried
