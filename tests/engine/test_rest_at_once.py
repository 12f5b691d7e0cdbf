"""Turns that are certain are served at once: the plans are those of one turn after the other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from simulation.device import StepCost
from simulation.jobs import Job, again
from simulation.orderings import limits_of
from simulation.replica import Bench, Shape

from router.qos.config import Account, QosConfig, Tier
from router.qos.steps import StepOrder
from router.qos.turns import Turns
from workers.engine.plan import StepPlan

# Plans differ in one of these where a limit is not looked at: pacing, quantum, seconds, the step's tokens, blocks.
SEEDS = (2, 4, 38, 60, 126)


class OneByOne(Turns):
    """Nothing is certain."""

    def rest(self) -> None:
        return None


class AtOnce(Turns):
    """Counts the turns that were served at once."""

    count = 0

    def all_served(self, served: Iterable[Any]) -> None:
        served = list(served)
        AtOnce.count += len(served)
        super().all_served(served)


class Order(StepOrder):
    """The shipped one with other turns."""

    kind: type[Turns] = Turns

    def turns(self, now: float, *, base: float, bounded: bool) -> Turns:
        oldest = {t.name: oldest for t, oldest in self._deadlines()}
        return self.kind(self.policy, now, oldest, base=base, bounded=bounded)


def plans(kind: type[Turns], config: QosConfig, shape: Shape, jobs: list[Job], **limits: Any) -> list[StepPlan]:
    order = Order(config, limits_of(shape, 200, **limits))
    order.kind = kind
    bench, seen = Bench(shape, order), list[StepPlan]()
    submit = bench.replica.device.submit

    def watched(plan: StepPlan) -> Any:
        seen.append(plan)
        return submit(plan)

    bench.replica.device.submit = watched  # type: ignore[method-assign]
    bench.run(again(jobs))
    return seen


def run(seed: int) -> int:
    """How many turns were served at once."""
    rng = random.Random(seed)
    tiers = tuple(
        Tier(
            i,
            f"T{i}",
            min_share=rng.choice((0.0, 0.1)) if i else 0.0,
            max_wait=rng.choice((None, 0.1)),
            itl_target=rng.choice((None, 0.01)),
        )
        for i in range(rng.choice((1, 1, 2, 3)))
    )
    users = rng.choice((3, 12))
    accounts = tuple(Account(rng.choice(tiers), f"u{i}", float(rng.choice((0, 1, 1, 20)))) for i in range(users))
    config = QosConfig(tiers, accounts, tau=rng.choice((0.0, 0.001, 0.018)))
    shape = Shape(8, rng.choice((12, 128)), rng.choice((320, 16_000)), StepCost(), step_ahead=rng.random() < 0.7)
    jobs, now, longest = [], 0.0, rng.choice((4, 50))
    for number in range(20):
        now += rng.choice((0.0, 0.0, 0.02))
        jobs.append(Job(number, f"u{rng.randrange(users)}", rng.randint(1, longest), rng.randint(1, 120), now))
    limits = {"quantum": rng.choice((2.0, 512.0)), "pacing": rng.choice((None, 20.0))}
    AtOnce.count = 0
    assert plans(AtOnce, config, shape, jobs, **limits) == plans(OneByOne, config, shape, jobs, **limits)
    return AtOnce.count


def test_the_plans_are_the_same() -> None:
    assert sum(map(run, SEEDS)) > 1000
