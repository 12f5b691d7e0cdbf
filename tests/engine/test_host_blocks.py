"""Evicted blocks in host memory: who is held, who makes room, what the next plan copies, and what it saves.

Mutants seen to fail: a block that is about to be read written anew; what was dropped copied out all the same; a copy
that is charged as prefill; a faulty request's blocks kept.
"""

from __future__ import annotations

import pytest
from engine_orderings import ByOwner
from engine_runs import Harness, request

from router.dispatch.prefixes import PrefixIndex
from workers.api.config import EngineConfig
from workers.api.errors import ConfigError
from workers.api.hashing import SHORT_BYTES
from workers.api.request import FinishReason
from workers.engine.host_blocks import HostBlocks

A, B, C, D = (bytes([n]) * 16 for n in range(4))


def test_the_longest_unused_makes_room() -> None:
    host = HostBlocks(2)
    assert host.save(A, 5) == []
    assert host.save(B, 6) == []
    assert host.save(A, 9) == []  # is here already
    assert host.save(C, 7) == [B]
    out, into = host.take_copies()
    assert (sorted(out), into) == ([(5, 0), (7, 1)], ())  # B was never read: nobody copies it
    assert host.digests == {A, C}
    assert host.take_copies() == ((), ())
    host.check()


def test_what_was_dropped_is_not_copied() -> None:
    host = HostBlocks(2)
    host.save(A, 5)
    host.save(B, 6)
    assert host.drop(A)
    assert host.take_copies() == (((6, 1),), ())
    host.check()


def test_what_the_next_plan_reads_is_not_written_by_it() -> None:
    host = HostBlocks(1)
    host.save(A, 5)
    host.take_copies()
    host.hold(A)
    assert host.save(B, 6) == []
    assert B not in host
    host.restore(A, 8)
    assert host.drop(A)
    assert host.save(C, 6) == []
    assert (C in host, host.take_copies()) == (False, ((), ((0, 8),)))
    assert host.save(C, 6) == []
    assert (C in host, host.drop(A)) == (True, False)
    host.check()


def filled(**more: object) -> Harness:
    """An engine whose pool holds one request of 24 tokens, after it ran one, and then one that took all blocks."""
    harness = Harness(block_size=4, num_blocks=8, max_num_batched_tokens=64, num_host_blocks=20, **more)  # type: ignore[arg-type]
    for name, prompt in (("a", range(24)), ("b", range(30, 58))):
        harness.submit(request(name, prompt, 4))
        harness.drain()
    return harness


def test_a_prompt_that_comes_back_is_copied_not_run_and_not_charged() -> None:
    ordering = ByOwner(False)
    harness = filled(ordering=ordering)
    host, before = harness.engine.roster.host, harness.engine.stats.executed
    assert host.copied_out >= 5
    harness.submit(request("again", range(24), 4, owner="late"))
    harness.drain()
    last = harness.receiver.last["again"]
    assert harness.receiver.tokens["again"] == harness.receiver.tokens["a"]
    assert (last.cached_tokens, last.executed_prefill) == (20, 4)
    assert host.copied_in == 5
    load = harness.engine.load()
    assert (load.copied_in, load.host_hits, load.prefix_hits) == (5, 20, 20)
    assert (load.copied_out, load.host_blocks, load.total_host_blocks) == (host.copied_out, len(host), 20)
    assert harness.engine.stats.executed - before == 4 + 3 + harness.engine.stats.overhead
    assert ordering.charges["again"][:2] == [4, 3]


def test_an_index_elsewhere_is_told_of_what_host_memory_holds() -> None:
    harness, index = Harness(block_size=4, num_blocks=8, max_num_batched_tokens=64, num_host_blocks=3), PrefixIndex(11)
    cache, host = harness.engine.roster.cache, harness.engine.roster.host
    for number in range(6):
        start = 7 * (number % 4)
        harness.submit(request(f"r{number}", range(start, start + 24), 4))
        while harness.engine.has_work:
            harness.step()
            news = harness.engine.cache_news(1000)
            if news is not None:
                index.take(news)
            assert index._held == {digest[:SHORT_BYTES] for digest in {*cache._block_of, *host.digests}}
    assert len(host) == 3


def test_nothing_of_a_faulty_request_is_kept() -> None:
    harness = filled(fault=lambda seed, position: seed == 9 and position >= 26)
    harness.submit(request("bad", range(24), 8, seed=9))  # what it begins with comes from the host, and is there still
    harness.drain()
    assert harness.receiver.last["bad"].cached_tokens == 20
    assert harness.receiver.finish("bad") is FinishReason.ERROR
    harness.submit(request("again", range(24), 2))
    harness.drain()
    assert harness.receiver.last["again"].cached_tokens == 0


@pytest.mark.parametrize(
    "values",
    [
        {"eviction_type": "swap"},
        {"eviction_type": "copy", "prefix_caching": False},
        {"num_cpu_blocks": 0},
        {"swap_space": 0},
    ],
    ids=["unknown", "no prefixes", "no blocks", "no bytes"],
)
def test_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**values)  # type: ignore[arg-type]
