"""G2, G3, G9: how far users of one tier drift apart, and what shares they get."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pool
from typing import Any

from simulation.device import StepCost
from simulation.jobs import Job, Maker
from simulation.replica import Bench, Shape
from simulation.rows import SHAPE, Row, at_most, gap_bound, longest_of, ours, step_units, tiers
from simulation.watch import Gaps, plain

_MOST_STEPS = 20_000  # a small trace that takes more is stuck


@dataclass(frozen=True, slots=True)
class Trace:
    """One small trace."""

    quotas: dict[str, float]
    jobs: list[Job]
    shape: Shape
    cancels: tuple[int, ...] = ()  # numbers of jobs whose clients go away


def trace(seed: int) -> Trace:
    """Any lengths, bursts and pauses, a pool that may just hold the longest; every third one is made to hurt."""
    rng = random.Random(seed)
    users = [f"u{i}" for i in range(rng.choice((2, 2, 2, 3, 4, 6)))]
    quotas = {u: float(rng.choice((1, 1, 5, 20, 99))) for u in users}
    budget = rng.choice((32, 64, 256))
    longest = rng.choice((60, 200, 500))
    kind = seed % 3
    jobs: list[Job] = []
    now = 0.0
    for i in range(rng.randint(6, 24)):
        user = rng.choice(users)
        now += rng.choice((0.0, 0.0, 0.0, 0.005, 0.1))
        if kind == 0:  # one side long prompts, the other long answers
            prompt, output = (longest - 8, 8) if user < "u1" else (8, rng.randint(4, longest - 8))
        else:
            output = rng.randint(1, max(longest // rng.choice((2, 10)), 1))
            prompt = rng.randint(1, max(longest - output, 1))
        if kind == 1 and user == "u0":  # asks only now and then, in bursts
            now += 0.2
        jobs.append(Job(i, user, prompt, output, now))
    slots = rng.choice((2, 8, 32))
    pool = rng.choice((longest + 80, 4 * longest, 40 * longest)) // 16 * 16 + 16
    shape = Shape(slots, max(budget, slots), pool, StepCost(), step_ahead=rng.random() < 0.5)
    gone = tuple(j.number for j in jobs if rng.random() < 0.05)
    return Trace(quotas, jobs, shape, gone)


def run_trace(seed: int, **limits: Any) -> tuple[int, float, str]:
    """The seed, the greatest gap as part of its bound, and what went wrong besides."""
    given = trace(seed)
    jobs = given.jobs
    bench = ours(tiers(given.quotas), jobs, given.shape, **limits)
    gaps = Gaps(given.quotas)
    bench.each_step.append(gaps)
    for number in given.cancels:
        bench.each_step.append(partial(_leave, jobs[number]))
    try:
        bench.run(jobs, steps=_MOST_STEPS)
    except AssertionError as error:
        return seed, 0.0, str(error)
    stuck = [j.number for j in jobs if j.ended is None]
    bound = gap_bound(given.shape, longest_of(jobs))
    return seed, gaps.part(lambda quota: bound / quota), f"{len(stuck)} requests never ended" if stuck else ""


def _leave(job: Job, bench: Bench) -> None:
    """Its client goes half-way through its answer."""
    if job.ended is None and job.emitted * 2 > job.output:
        bench.cancel(job)


def sweep(trials: int, *, processes: int, done: Container[int], tell: Callable[[int, float, str], None]) -> None:
    """Seeds 0 to `trials`, but those that are `done`; `tell` hears of each one."""
    left = [seed for seed in range(trials) if seed not in done]
    if processes == 1:
        for seed in left:
            tell(*run_trace(seed))
        return
    with Pool(processes) as pool:
        for got in pool.imap_unordered(run_trace, left, chunksize=16):
            tell(*got)


def g2(traces: Mapping[int, tuple[float, str]]) -> Row:
    """What the sweep found, by seed; and the two figures that have bounds of their own."""
    worst = max((part for part, _ in traces.values()), default=0.0)
    violations = sum(part > 1.0 or bool(wrong) for part, wrong in traces.values())
    start, vtc = common_start(), overload_gap()
    says = (
        f"violations of 2 (U + E + L) / min q, of progress or of the books, in random and adversarial traces; the "
        f"greatest gap is {worst:.2f} of its bound; from a common start {start:.2f} of (U + X) / min q; VTC's two "
        f"clients drift {vtc:.0f} apart (7,424 allowed)"
    )
    return Row(violations, 0, violations == 0 and start <= 1.0 and vtc <= 7424, len(traces), says)


def common_start() -> float:
    """With work that is always admissible, from a common start: the part of (U + X) / min q."""
    make, quotas = Maker(), {"a": 1.0, "b": 3.0, "c": 6.0}
    jobs = make("a", 900, 40, n=300) + make("b", 300, 90, n=600) + make("c", 30, 150, n=900)
    shape = replace(SHAPE, slots=2000, pool=2_000_000)
    bench = ours(tiers(quotas), jobs, shape)
    gaps = Gaps(quotas)
    bench.each_step.append(gaps)
    bench.run(jobs, until=4.0)
    most = 2.0 * step_units(shape)
    return max(gaps.start[a, b] * min(quotas[a], quotas[b]) / most for a, b in gaps.start)


def overload_gap() -> float:
    """VTC's two clients, both beyond their share, 256 in and 256 out, in VTC's units."""
    make = Maker()
    jobs = make("one", 256, 256, n=600, every=0.02) + make("two", 256, 256, n=1200, every=0.01)
    quotas = {"one": 1.0, "two": 1.0}
    bench = ours(tiers(quotas), jobs, replace(SHAPE, budget=1024, pool=60_000))
    gaps = Gaps(quotas, measure=plain)
    bench.each_step.append(gaps)
    bench.run(jobs, until=12.0)
    return max(gaps.worst.values())


def backlog(quotas: dict[str, float], seconds: float) -> list[Job]:
    """More than each can get, of mixed lengths."""
    make, rng = Maker(), random.Random(7)
    jobs: list[Job] = []
    for number, (user, quota) in enumerate(quotas.items()):
        left = 200_000 + 50_000 * seconds * quota / sum(quotas.values())
        while left > 0:
            prompt = rng.choice(((20, 200, 1500), (1000, 4000), (10, 50))[number % 3])
            output = rng.choice(((10, 60, 200), (5, 20), (100, 300))[number % 3])
            jobs += make(user, prompt, output)
            left -= prompt + 2 * output
    return jobs


def share_error(quotas: dict[str, float], seconds: float) -> float:
    """The greatest difference of a share of useful service and its quota."""
    jobs = backlog(quotas, seconds)
    bench = ours(tiers(quotas), jobs).run(jobs, until=seconds)
    assert bench.waiting == set(quotas), "somebody ran out of work"
    units = {u: bench.books.users[u].units for u in quotas}
    total, weights = sum(units.values()), sum(quotas.values())
    return max(abs(units[u] / total - q / weights) for u, q in quotas.items())


def g3(seconds: float) -> Row:
    """Four mixes of quotas."""
    mixes: list[dict[str, float]] = [
        {"a": 95, "b": 5},
        {"a": 50, "b": 50},
        {"a": 30, "b": 30, "c": 40},
        {"a": 60, "b": 40, "z": 0},
    ]
    worst = max(share_error(quotas, seconds) for quotas in mixes)
    return at_most(worst, 0.01, f"error of shares of useful service over {seconds:g} s, quota 0 among them", len(mixes))


def g9() -> Row:
    """Returns from idle; gaps from the first step after the return."""
    make, quotas = Maker(), {"steady": 1.0, "guest": 1.0}
    jobs = make("steady", 300, 100, n=3000)
    for start in (10.0, 25.0, 45.0):
        jobs += make("guest", 300, 100, n=150, at=start)
    bench = ours(tiers(quotas), jobs)
    gaps = Gaps(quotas)
    bench.each_step.append(gaps)
    bench.run(jobs, until=60.0)
    bound = gap_bound(SHAPE, longest_of(jobs))
    return at_most(
        gaps.part(lambda quota: bound / quota), 1.0, "gap after three returns from idle, as part of its bound", 3
    )
