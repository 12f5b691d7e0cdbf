"""G1: what a flood of a lower tier costs a higher one; the frontier of tau; G5: what a lower tier is owed anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from simulation.device import LOOKING_BACK
from simulation.jobs import Job, Maker, quantile
from simulation.replica import Bench, Shape
from simulation.rows import SHAPE, Row, at_least, at_most, first_come, ours, tiers
from simulation.watch import Waits

TAU = 0.018
ITL_TARGET = 0.025  # seconds
FLOOD_PROMPT = 4000  # tokens
_EVERY, _NUMBER, _START = 1.9, 30, 2.0  # of the upper tier's requests
_END = _START + _EVERY * _NUMBER + 2.0


def platinum(make: Maker) -> list[Job]:
    """600 tokens in, 60 out, now and then."""
    return make("vip", 600, 60, n=_NUMBER, at=_START, every=_EVERY)


def long_prompts(make: Maker) -> list[Job]:
    """50 requests of so many tokens for each of the upper tier's."""
    return make("flood", FLOOD_PROMPT, 50, n=50 * _NUMBER, every=_EVERY / 50)


def long_answers(make: Maker) -> list[Job]:
    """50 requests of 1,500 tokens out."""
    return make("flood", 100, 1500, n=50 * _NUMBER, every=_EVERY / 50)


@dataclass(frozen=True, slots=True)
class Isolation:
    """The upper tier's p99, seconds, and the useful tokens a second of all."""

    ttft: float
    itl: float
    tokens: float
    longest_step: float


def measured(bench: Bench, jobs: list[Job]) -> Isolation:
    """Of a run that is over."""
    vip = [j for j in jobs if j.user == "vip"]
    served = bench.books.users.values()
    return Isolation(
        quantile([j.ttft for j in vip], 0.99),
        quantile([g for j in vip for g in j.gaps], 0.99),
        sum(s.prefill + s.decode for s in served) / bench.now,
        bench.replica.device.longest,
    )


def under(flood: Callable[[Maker], list[Job]] | None, *, tau: float = TAU, shape: Shape = SHAPE) -> Isolation:
    """The upper tier beside `flood`."""
    make = Maker()
    jobs = platinum(make) + (flood(make) if flood else [])
    bench = ours(tiers({"vip": 100}, {"flood": 100}), jobs, shape, tau=tau)
    return measured(bench.run(jobs, until=_END), jobs)


def g1() -> Row:
    """Both floods, and long prompts where attention over them costs. The figure is the worst part of its bound that any
    of the six values takes.
    """
    attentive = replace(SHAPE, cost=LOOKING_BACK)
    bounds = {shape: _bounds(shape) for shape in (SHAPE, attentive)}
    parts, times = [], []
    for flood, shape in ((long_prompts, SHAPE), (long_answers, SHAPE), (long_prompts, attentive)):
        got, (most_ttft, most_itl) = under(flood, shape=shape), bounds[shape]
        parts += [got.ttft / most_ttft, got.itl / most_itl]
        times.append(
            f"TTFT {1e3 * got.ttft:.0f} ms of {1e3 * most_ttft:.0f}, ITL {1e3 * got.itl:.1f} of {1e3 * most_itl:.1f}"
        )
    says = (
        "p99, and what they may be, under 50x floods of long prompts, of long answers, and of long prompts where "
        f"attention over them costs: {'; '.join(times)}; the worst as part of its bound"
    )
    return at_most(max(parts), 1.0, says, trials=3)


def _bounds(shape: Shape) -> tuple[float, float]:
    """The most that TTFT and ITL may be, seconds."""
    quiet = under(None, shape=shape)
    longest = shape.cost.seconds(shape.budget, shape.slots, shape.pool, shape.budget * FLOOD_PROMPT)
    ttft = quiet.ttft + 2 * longest + (1 + 600 // shape.budget) * TAU
    return ttft, max(1.3 * quiet.itl, ITL_TARGET)


def frontier(taus: tuple[float, ...]) -> list[dict[str, Any]]:
    """For each tau: the upper tier's ITL (p99) and the throughput as part of first come, first served, by flood."""
    rows = []
    for name, flood in (("long prompts", long_prompts), ("long answers", long_answers)):
        make = Maker()
        jobs = platinum(make) + flood(make)
        base = measured(first_come(jobs, until=_END), jobs)
        for tau in taus:
            got = under(flood, tau=tau)
            rows.append(
                {"flood": name, "tau": tau, "itl": got.itl, "ttft": got.ttft, "speed": got.tokens / base.tokens}
            )
    return rows


def g5() -> Row:
    """A floor of 2 % under endless work of the tier above; and its requests complete; and max_wait is kept."""
    make = Maker()
    jobs = make("vip", 1000, 100, n=4000) + make("bronze", 800, 200, n=60)
    bench = ours(tiers({"vip": 100}, {"bronze": 100}, T1={"min_share": 0.02}), jobs, tau=0.0)
    waits = Waits()
    bench.each_step.append(waits)
    bench.run(jobs, until=60.0)
    complete = sum(j.user == "bronze" and j.done for j in jobs)
    share = bench.books.users["bronze"].units / waits.served.get("bronze", 1.0)
    starved = not bench.live["vip"] or not bench.live["bronze"]
    late = max_wait()
    says = (
        f"share of useful service under a floor of 2 %; {complete} of its requests completed; with max_wait 5 s the "
        f"first token of the oldest came after {late:.2f} s"
    )
    row = at_least(share, 0.019, says, trials=2)
    return Row(row.figure, row.bound, row.passed and complete > 0 and not starved and late <= 6.0, 2, says)


def max_wait() -> float:
    """Seconds until the lower tier's oldest request had its first token, with `max_wait` 5 s."""
    make = Maker()
    jobs = make("vip", 1000, 100, n=2500) + make("bronze", 800, 50, n=3, at=1.0)
    bench = ours(tiers({"vip": 100}, {"bronze": 100}, T1={"max_wait": 5.0}), jobs, tau=0.0)
    bench.run(jobs, until=30.0)
    return min(j.ttft for j in jobs if j.user == "bronze")
