"""What the QoS policy costs: one decision of the dispatcher, the turns of one engine step, and a plan of the engine.

    python benchmarks/qos_policy.py [--users 1000] [--queued 10000] [--slots 256]

A decision is one request through the waiting room: pushed, found first, granted, ended with its charge. The turns are
those of a step in which `slots` accounts decode, all others wait, no slot is free, and the step is settled: the worst
case, where each has its turn. The plan is that of an engine with all slots decoding and `queued` requests waiting, once
first come, first served. Times are of the CPU: what else runs on the machine counts less. A fixed loop of plain Python,
timed before and after each, says how fast the machine is meanwhile.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import NamedTuple

from engine_host import Instant

from router.qos.config import Account, QosConfig, Tier
from router.qos.fair_queue import Facts, FairQueue
from router.qos.ledger import Prices
from router.qos.policy import Limits, Policy
from router.qos.steps import StepOrder, step_limits
from router.qos.turns import Turns
from workers.api.config import EngineConfig
from workers.api.ordering import Charge
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.engine.scheduler import PlannedStep


class Request(NamedTuple):
    """What waits."""

    user: str
    arrived: float


def config(users: int) -> QosConfig:
    rng = random.Random(0)
    tiers = tuple(Tier(i, f"T{i}", max_queued=10**6, max_queued_per_user=10**6) for i in range(4))
    return QosConfig(tiers, tuple(Account(tiers[i % 4], f"u{i}", float(rng.randint(1, 99))) for i in range(users)))


def yardstick() -> float:
    """CPU seconds of a fixed loop."""
    began, kept = time.thread_time(), dict[int, float]()
    for i in range(5_000):
        kept[i & 255] = (i * 0.5) / 3.0 + len(kept)
    return time.thread_time() - began


def decisions(users: int, queued: int, count: int) -> list[float]:
    """CPU seconds of each."""
    rng, now = random.Random(1), [0.0]
    queue: FairQueue[Request] = FairQueue(
        config(users),
        Limits(step=100_000.0),
        describe=lambda r: Facts(r.user, "", 500.0, r.arrived),
        clock=lambda: now[0],
        limit=10**9,
    )
    for i in range(queued):
        queue.push(f"q{i}", Request(f"u{rng.randrange(users)}", 0.0))
    taken: list[float] = []
    for i in range(count):
        now[0] += 0.001
        request = Request(f"u{rng.randrange(users)}", now[0])
        began = time.thread_time()
        queue.push(f"n{i}", request)
        first = queue.first()
        assert first is not None
        queue.granted(first)
        queue.ended(first, 300, 100, 40_000)
        taken.append(time.thread_time() - began)
    return taken


def steps(users: int, queued: int, slots: int, count: int) -> list[float]:
    """CPU seconds of the turns of a step and of its settlement."""
    prices = Prices()
    policy = Policy(config(users), Limits(prices.most_a_step(2048, 400_000), longest=8192.0, tau=1e9), prices)
    standings = [policy.standing(a) for a in policy.config.accounts]
    for i in range(queued):
        policy.queued(standings[i % users])
    for standing in standings[:slots]:
        policy.admitted(standing)
    taken: list[float] = []
    for step in range(count):
        began = time.thread_time()
        turns = Turns(policy, float(step))
        turns.admitting = False
        left, ran = 2048, []
        while left > 0 and (turn := turns.next()) is not None:
            ran.append(turn.flow)
            left -= 1
            turns.served(4.0, more=False, seconds=20e-6)
        provisional = turns.close()
        policy.commit(len(ran), [Charge(s, 0, 1, 1000) for s in ran], provisional)
        taken.append(time.thread_time() - began)
        assert len(ran) == slots
    return taken


def plans(users: int, queued: int, slots: int, count: int, *, ordered: bool) -> list[float]:
    """CPU seconds of each."""
    prices, rng = Prices(), random.Random(1)
    limits = step_limits(prices, step_tokens=2048, pool_tokens=slots * 2048, context=2048)
    engine = Engine(
        EngineConfig(max_num_seqs=slots, prefix_caching=False),
        Instant(),
        num_blocks=slots * 128,
        max_model_len=2048,
        ordering=StepOrder(config(users), limits, prices) if ordered else None,
    )
    for i in range(slots + queued):
        owner = 4 * (i % (users // 4)) if i < slots else rng.randrange(users)  # residents are of the highest tier
        engine.submit(EngineRequest(str(i), (1,) * 16, SamplingParams(max_tokens=1900), owner=f"u{owner}"))
        if i == slots - 1:
            for _ in range(20):
                engine.step()
    plan, taken = engine._scheduler.plan, []

    def timed(now: float) -> PlannedStep | None:
        began = time.thread_time()
        planned = plan(now)
        taken.append(time.thread_time() - began)
        return planned

    engine._scheduler.plan = timed  # type: ignore[method-assign]
    for _ in range(count):
        engine.step()
    assert len(engine.roster.residents) == slots
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=256)
    given = parser.parse_args()
    sizes = (given.users, given.queued, given.slots, 300)
    for name, measure in (
        ("a decision", lambda: decisions(given.users, given.queued, 2000)),
        (f"a step of {given.slots} turns", lambda: steps(*sizes)),
        (f"a plan of {given.slots} decodes", lambda: plans(*sizes, ordered=True)),
        ("the same, first come, first served", lambda: plans(*sizes, ordered=False)),
    ):
        sticks = [yardstick() for _ in range(50)]
        taken = measure()
        sticks += [yardstick() for _ in range(50)]
        low, high = min(taken) * 1e6, statistics.quantiles(taken, n=100)[-1] * 1e6
        print(
            f"{name}: median {statistics.median(taken) * 1e6:.0f} us, least {low:.0f}, p99 {high:.0f}, n={len(taken)}; "
            f"the yardstick {statistics.median(sticks) * 1e6:.0f}, least {min(sticks) * 1e6:.0f}"
        )


if __name__ == "__main__":
    main()
