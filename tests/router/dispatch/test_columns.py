"""Many replicas at once come to the same decisions as one after the other.

Mutants seen to fail: numbers not read anew; ties by place alone; room that an empty replica lacks; blocks not looked
at; the step under way left out; hashes of prompts not looked at; nobody made to yield; columns of one that is gone.
"""

from __future__ import annotations

import random

import pytest

from router.dispatch import fleet
from router.dispatch.columns import Columns
from router.dispatch.dispatcher import DispatcherConfig, Reply
from router.dispatch.lease import Granted, LeaseLost, Outcome, Refused, Settle
from router.dispatch.prefixes import prompt_hashes_now
from workers.api.hashing import SHORT_BYTES, block_hashes
from workers.api.ordering import ServiceReport
from workers.api.replica import CacheNews, LoadReport

from .test_dispatch_by_qos import TIERS, config_of
from .virtual import ask, info, made

REPLICAS = 12
SHARED = tuple(range(400))


def told(strategy: str, seed: int, *, tiered: bool) -> list[object]:
    """What a dispatcher says to some hundred random events."""
    rng = random.Random(seed)
    config = DispatcherConfig(strategy=strategy, recovery=0.0, qos=config_of(TIERS), suspect_after=2.0)
    d, clock = made(config, seed=seed)
    said: list[object] = []
    held: dict[str, int] = {}  # prompt tokens

    def hear(*messages: Granted | Refused | LeaseLost | None) -> None:
        for message in messages:
            said.append(message)
            if isinstance(message, Granted):
                held[message.lease_id] = prompts[message.lease_id]
            elif isinstance(message, LeaseLost):
                del held[message.lease_id]

    def take(replies: list[Reply]) -> None:
        hear(*(reply.message for reply in replies))

    prompts: dict[str, int] = {}
    names = [f"r{i}" for i in range(REPLICAS)]
    for name in names:
        take(d.replica_up(info(name, slots=3, blocks=40)))
        if tiered:
            take(d.service(name, ServiceReport(0, 0, (), True)))
    cached = b"".join(h[:SHORT_BYTES] for h in block_hashes(SHARED, 16))
    for number in range(400):
        clock.now += rng.choice((0.0, 0.003, 0.03))
        event, name = rng.random(), rng.choice(names)
        if event < 0.45:
            known = rng.random() < 0.3
            tokens = (*SHARED[: rng.randrange(20, 400)], number)
            prompt = len(tokens) if known else rng.choice((30, 30, 300, 600))
            request = ask(
                f"q{number}", prompt=prompt, choices=rng.choice((1, 1, 2)), owner=rng.choice(("cheap", "other", "vip")),
                prompt_hashes=prompt_hashes_now(tokens, 16) if known else None,
                excluded=(name,) if rng.random() < 0.05 else (),
            )  # fmt: skip
            prompts[request.lease_id] = prompt
            hear(d.acquire("i", request))
        elif event < 0.65 and held:
            lease_id = rng.choice(sorted(held))
            first, outcome = 0.02 * rng.random(), Outcome.LOST if rng.random() < 0.05 else Outcome.COMPLETED
            take(d.settle(Settle(lease_id, outcome, held.pop(lease_id), 20, 0, 21, first_seconds=first)))
        elif event < 0.93:
            rows = rng.randrange(3)
            report = LoadReport(
                number, 0.01 + 0.004 * rows, prefill_tokens=rng.choice((0, 0, 200)), decode_tokens=rows, running=rows,
                kv_tokens=300 * rows, prefill_backlog=rng.choice((0, 0, 500)), planned_decode=rng.choice((0, 1, 9)),
                free_blocks=40 - rng.choice((0, 0, 15 * rows)), total_blocks=40,
            )  # fmt: skip
            take(d.load(name, report))
        elif event < 0.96:
            d.cache(name, CacheNews(cached[: rng.randrange(26) * SHORT_BYTES], anew=True))
        elif event < 0.97:
            take(d.replica_down(name))
            take(d.replica_up(info(name, slots=3, blocks=40)))
        else:
            take(d.tick())
    assert d.ledger().balanced
    return said


@pytest.mark.parametrize("tiered", [False, True], ids=["plain", "tiered"])
@pytest.mark.parametrize("strategy", ["min_expected_latency", "power_of_two"])
def test_decisions_are_those_of_the_loops(strategy: str, tiered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    free = Columns.free

    def counted(self: Columns, choices: int, blocks: int) -> object:
        nonlocal looks
        looks += 1
        return free(self, choices, blocks)

    monkeypatch.setattr(Columns, "free", counted)
    for seed in range(3):
        one_by_one = told(strategy, seed, tiered=tiered)
        assert looks == 0
        with monkeypatch.context() as patch:
            patch.setattr(fleet, "_MANY", 2)
            at_once = told(strategy, seed, tiered=tiered)
        assert looks > 100
        assert sum(isinstance(m, Granted) for m in one_by_one) > 50
        assert at_once == one_by_one
        looks = 0
