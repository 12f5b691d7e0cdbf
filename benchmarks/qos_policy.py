"""What the QoS policy costs: one decision of the dispatcher, the turns of one engine step, and a plan of the engine.

    python benchmarks/qos_policy.py [--users 1000] [--queued 10000] [--slots 256]

A decision is one request through the waiting room: pushed, found first, granted, ended with its charge. The turns are
those of a step in which `slots` accounts decode, all others wait, no slot is free, and the step is settled: each has a
turn of its own. A plan is that of an engine with all slots decoding and `queued` requests waiting: of steps in which
nothing has to be decided; of those in which a slot is free, since somebody has ended; and of those in which slots are
free, but blocks are not, while all four tiers decode.

Times are of the CPU: what else runs on the machine counts less. A fixed loop of plain Python, timed before and after
each, says how fast the machine is meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, slots=True)
class Case:
    """An engine with `slots` decodes, of accounts of `tiers`, and `queued` requests waiting, of `waiting`.

    `room`: so many more slots, for which there are no blocks. `answer`: the most tokens that one may have; who ends is
    replaced by one more that waits. `ordered` False: first come, first served. `disputed`: only plans that took turns
    are looked at, otherwise only those that took none.
    """

    room: int = 0
    answer: int = 0  # no end
    tiers: tuple[int, ...] = (0,)
    waiting: tuple[int, ...] = (0, 1, 2, 3)
    ordered: bool = True
    disputed: bool = True


CASES = {
    "nothing to decide": Case(disputed=False),
    "the same, first come, first served": Case(ordered=False, disputed=False),
    "one has ended, one enters": Case(answer=400),
    "slots but no blocks, four tiers": Case(room=64, tiers=(0, 1, 2, 3), waiting=(3,)),
}


def plans(users: int, queued: int, slots: int, count: int, case: Case) -> list[float]:
    """CPU seconds of each."""
    prices, rng, context = Prices(), random.Random(1), 2048
    limits = step_limits(prices, step_tokens=2048, pool_tokens=slots * context, context=context)
    order = StepOrder(config(users), limits, prices)
    engine = Engine(
        EngineConfig(max_num_seqs=slots + case.room, prefix_caching=False),
        Instant(),
        num_blocks=slots * (8 if case.room else 128),
        max_model_len=context,
        ordering=order if case.ordered else None,
    )
    names = itertools.count()

    def submit(user: int, prompt: int) -> None:
        answer = rng.randint(1, case.answer) if case.answer else 1900
        request = EngineRequest(str(next(names)), (1,) * prompt, SamplingParams(max_tokens=answer), owner=f"u{user}")
        engine.submit(request)

    def wait() -> None:
        submit(4 * rng.randrange(users // 4) + rng.choice(case.waiting), 1900 if case.room else 16)

    for i in range(slots):  # one account each
        submit(4 * (i // len(case.tiers)) % users + case.tiers[i % len(case.tiers)], 16)
    for _ in range(20):
        engine.step()
    for _ in range(queued):
        wait()
    plan, turns = engine._scheduler.plan, order.turns
    taken: dict[bool, list[float]] = {True: [], False: []}  # by whether turns were taken
    asked = False

    def timed(now: float) -> PlannedStep | None:
        nonlocal asked
        asked = False
        began = time.thread_time()
        planned = plan(now)
        taken[asked].append(time.thread_time() - began)
        return planned

    def watched(now: float, *, base: float, bounded: bool) -> Turns:
        nonlocal asked
        asked = True
        return turns(now, base=base, bounded=bounded)

    engine._scheduler.plan = timed  # type: ignore[method-assign]
    order.turns = watched  # type: ignore[method-assign]
    while len(taken[case.disputed]) < count:
        for delta in engine.step():
            if delta.finish is not None:
                wait()
    return taken[case.disputed]


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
        *((f"a plan, {name}", partial(plans, *sizes, case)) for name, case in CASES.items()),
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
