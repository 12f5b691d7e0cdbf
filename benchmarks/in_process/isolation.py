"""G1: what a flood of the tier below costs the tier above, on this device.

The upper tier asks now and then (600 tokens in, 60 out), first alone, then beside 50 requests of the lower one to each
of its own: long prompts (4,000 in, 50 out), and long answers (100 in, 1,500 out). Its first tokens may be later by
(1 + p) T_max + k tau: T_max is the longest step of that run, k the steps that its prompt takes, p = 1 since steps are
planned one ahead. The gaps between its tokens may be 1.3 times what they are alone, or its `itl_target`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from live.figures import Figure, single
from simulation.jobs import Job, Maker, quantile

from in_process.feed import Fed, Plant, soundness
from router.qos.config import TAU, Account, QosConfig, Tier

AHEAD = 1  # p
ITL_TARGET = 0.025  # seconds
SETTLED = 1.0  # seconds after which a run is looked at


@dataclass(frozen=True, slots=True)
class Load:
    """Lengths in tokens: (prompt, answer); `every`: mean seconds between the upper tier's requests, `seconds` of each
    run; `crowd`: requests of the lower tier to one of the upper.
    """

    every: float = 0.5
    seconds: float = 9.0
    crowd: int = 50
    upper: tuple[int, int] = (600, 60)
    prompts: tuple[int, int] = (4000, 50)
    answers: tuple[int, int] = (100, 1500)

    def divided(self, by: int) -> Load:
        """All lengths are `by` times less."""
        upper, prompts, answers = ((-(-i // by), -(-o // by)) for i, o in (self.upper, self.prompts, self.answers))
        return Load(self.every, self.seconds, self.crowd, upper, prompts, answers)

    @property
    def floods(self) -> dict[str, tuple[int, int]]:
        """By name."""
        return {"long prompts": self.prompts, "long answers": self.answers}

    def jobs(self, flood: tuple[int, int] | None, seed: int = 1) -> list[Job]:
        """Of a run; the upper tier's are the same whatever the flood. They stop 1 s before the end, if it is later."""
        rng, make = random.Random(seed), Maker()
        jobs: list[Job] = []
        at = SETTLED
        while at < self.seconds - min(1.0, self.seconds / 10):
            jobs += make("vip", *self.upper, at=at)
            at += self.every * rng.uniform(0.5, 1.5)
        if flood is not None:
            rate = self.crowd / self.every
            jobs += make("crowd", *flood, n=int(self.seconds * rate), every=1 / rate)
        return jobs


@dataclass(frozen=True, slots=True)
class Isolation:
    """Of one run. Seconds; `first` and `gaps` of the upper tier, useful tokens a second of all."""

    first: list[float]
    gaps: list[float]
    tokens: float
    fed: Fed

    @classmethod
    def of(cls, fed: Fed, jobs: list[Job]) -> Isolation:
        """A request without a first token has waited until the end, at least."""
        vips = [j for j in jobs if j.user == "vip"]
        first = [j.ttft if j.first is not None else fed.seconds - j.arrived for j in vips]
        return cls(first, [g for j in vips for g in j.gaps], fed.speed(SETTLED, fed.seconds), fed)


def tiers(itl_target: float, tau: float) -> QosConfig:
    """One user in each of two."""
    upper, lower = Tier(0, "Platinum", itl_target=itl_target), Tier(1, "Bronze")
    return QosConfig((upper, lower), (Account(upper, "vip", 100.0), Account(lower, "crowd", 100.0)), tau=tau)


def warm_up(plant: Plant, load: Load, seconds: float = 2.0) -> None:
    """What is compiled or allocated at first use."""
    for flood in load.floods.values():
        plant.run(tiers(ITL_TARGET, TAU), load.jobs(flood), until=seconds)


def measure(
    plant: Plant, load: Load, *, budget: int, itl_target: float, taus: Sequence[float]
) -> Iterator[list[Figure]]:
    """Figures as they come, run by run. `budget`: tokens a step. Times in seconds."""

    def run(config: QosConfig | None, flood: tuple[int, int] | None) -> Isolation:
        jobs = load.jobs(flood)
        return Isolation.of(plant.run(config, jobs, until=load.seconds), jobs)

    steps = -(-load.upper[0] // budget)
    alone = run(tiers(itl_target, taus[0]), None)
    yield _times("alone", alone)
    for flood, lengths in load.floods.items():
        base = run(None, lengths)
        name = f"{flood}, first come, first served"
        yield [*_times(name, base), single(f"{name}: useful tokens", base.tokens, "/s")]
        for tau in taus:
            got = run(tiers(itl_target, tau), lengths)
            most_gap = max(1.3 * quantile(alone.gaps, 0.99), itl_target)
            most_first = quantile(alone.first, 0.99) + (1 + AHEAD) * got.fed.longest + steps * tau
            yield beside(f"{flood}, tau {1e3 * tau:g} ms", got, base.tokens, most_first, most_gap)


def beside(name: str, got: Isolation, base: float, most_first: float, most_gap: float) -> list[Figure]:
    """A run beside a flood; `base`: useful tokens a second of first come, first served. Bounds are in seconds."""
    return [
        *_times(name, got, most_first, most_gap),
        single(f"{name}: T_max, the longest step", 1e3 * got.fed.longest, "ms"),
        single(f"{name}: useful tokens", got.tokens, "/s"),
        single(f"{name}: their part of first come, first served", got.tokens / base),
        single(f"{name}: preemptions", got.fed.preemptions),
        *soundness(name, [got.fed]),
    ]


def _times(name: str, got: Isolation, most_first: float | None = None, most_gap: float | None = None) -> list[Figure]:
    """p99 of first tokens, and of the gaps, if any token came after a first one."""
    figures = [_p99(f"{name}: first token, p99", got.first, most_first)]
    if got.gaps:
        figures.append(_p99(f"{name}: between tokens, p99", got.gaps, most_gap))
        figures.append(single(f"{name}: between tokens, median", 1e3 * quantile(got.gaps, 0.5), "ms"))
    return figures


def _p99(name: str, seconds: Sequence[float], most: float | None) -> Figure:
    value = 1e3 * quantile(seconds, 0.99)
    bound = None if most is None else 1e3 * most
    return Figure(name, value, value, value, "ms", bound, values=tuple(1e3 * s for s in seconds))
