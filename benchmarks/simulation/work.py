"""G4 and G8: nothing is wasted, what is charged is what was executed; and the traces that run on one replica."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from simulation.jobs import Job, Maker, again
from simulation.orderings import policy_of
from simulation.replica import Bench, Shape
from simulation.rows import SHAPE, Row, at_most, first_come, gap_bound, longest_of, ours, tiers
from simulation.watch import Gaps

SPEED = 0.97  # of first come, first served: the least makespan


def raced(quotas: dict[str, float], jobs: list[Job], shape: Shape, **limits: Any) -> tuple[Bench, Gaps, float]:
    """A finite trace to its end: the bench, the gaps, and the speed relative to first come, first served."""
    bench = ours(tiers(quotas), jobs, shape, **limits)
    gaps = Gaps(quotas)
    bench.each_step.append(gaps)
    bench.run(jobs)
    assert all(j.done for j in jobs), "somebody is stuck"
    return bench, gaps, first_come(jobs, shape).now / bench.now


def g4(trials: int) -> Row:
    """Finite traces of one tier, pool >= 4 L; empty plans raise. The figure is the least speed."""
    least, most = 1e9, 0.0
    for seed in range(trials):
        rng, make = random.Random(1000 + seed), Maker()
        jobs: list[Job] = []
        for i in range(400):
            jobs += make(rng.choice("abcd"), rng.randint(10, 3000), rng.randint(5, 250), at=i * 0.01)
        bench, _, speed = raced({"a": 10, "b": 20, "c": 30, "d": 40}, jobs, replace(SHAPE, pool=40_000))
        least = min(least, speed)
        most = max(most, bench.replica.device.repeats / bench.replica.device.busy)
    says = (
        f"least makespan of first come, first served / ours; recompute at most {100 * most:.2f} % of busy time; "
        "no empty plan"
    )
    return Row(least, SPEED, least >= SPEED and most <= 0.02, trials, says)


def g8(trials: int) -> Row:
    """Random work with cancels, preemption and cache hits: tokens by which policy, engine and our books differ."""
    wrong, evicted, cached = 0, 0, 0
    for seed in range(trials):
        rng, make = random.Random(seed), Maker()
        jobs: list[Job] = []
        for i in range(160):
            prompt = 640 + rng.randint(0, 2000)
            jobs += make(
                rng.choice("abz"), prompt, rng.randint(2, 300), at=i * 0.02, prefix=rng.randrange(3),
                prefix_tokens=rng.choice((0, 0, 512)),
            )  # fmt: skip
        shape = Shape(slots=24, pool=8_000, prefix_caching=True, step_ahead=bool(seed % 2))
        bench = ours(tiers({"a": 1, "b": 2}, {"z": 1}), jobs, shape)
        for part in range(0, 160, 8):
            bench.run(jobs[part : part + 8], steps=40)
            bench.cancel(rng.choice(jobs[: part + 8]))
        bench.run([])
        wrong += books_differ(bench)
        evicted += bench.replica.engine.stats.preemptions
        cached += sum(j.cached for j in jobs)
    says = (
        f"tokens by which users + overhead, the engine's counts and books made from plans alone differ; "
        f"{evicted} preemptions, {cached} cached tokens, {20 * trials} cancels"
    )
    return Row(wrong, 0, wrong == 0 and evicted > 0 and cached > 0, trials, says)


def books_differ(bench: Bench) -> int:
    """Tokens, summed over all accounts and kinds."""
    ledger, books, stats = policy_of(bench.replica).ledger, bench.books, bench.replica.engine.stats
    wrong = abs(ledger.missing) + abs(ledger.executed - books.executed) + abs(ledger.overhead - books.overhead)
    wrong += abs(stats.executed - books.executed)
    for (_, user), totals in ledger.accounts.items():
        served = books.users[user]
        wrong += abs(totals.prefill - served.prefill) + abs(totals.decode - served.decode)
        wrong += abs(totals.kv_read - served.kv_read)
    return wrong


def long_short() -> Row:
    """30,000 in / 16 out against 50 / 200: shares of useful service while both wait, and the speed."""
    make = Maker()
    jobs = make("long", 30_000, 16, n=24) + make("short", 50, 200, n=1600)
    random.Random(3).shuffle(jobs)
    jobs = renumbered(jobs)
    quotas = {"long": 50.0, "short": 50.0}
    bench = ours(tiers(quotas), jobs, replace(SHAPE, pool=130_000))
    shares = _SharesWhileBoth("long", "short")
    bench.each_step.append(shares)
    bench.run(jobs)
    assert all(j.done for j in jobs), "somebody is stuck"
    speed = first_come(jobs, replace(SHAPE, pool=130_000)).now / bench.now
    says = (
        f"error of shares while both wait (a prompt is {shares.grain:.3f} of them); speed {speed:.3f} of first come, "
        "first served"
    )
    error = shares.error
    return Row(error, 0.01, error <= max(0.01, shares.grain / 2) and speed >= SPEED, 1, says)


class _SharesWhileBoth:
    """Service of two from when both first wait until one does no more for good."""

    def __init__(self, a: str, b: str) -> None:
        self._a, self._b = a, b
        self._both = (0.0, 0.0)

    def __call__(self, bench: Bench) -> None:
        if {self._a, self._b} <= bench.waiting:
            self._both = (bench.books.users[self._a].units, bench.books.users[self._b].units)

    @property
    def error(self) -> float:
        return abs(self._both[0] / sum(self._both) - 0.5)

    @property
    def grain(self) -> float:
        """One long prompt, as a part of all."""
        return 30_016 / sum(self._both)


def kv_decode() -> Row:
    """200 / 8,000 against 200 / 100, pool of 40k tokens."""
    make = Maker()
    jobs = make("long", 200, 8000, n=16) + make("short", 200, 100, n=400)
    jobs = renumbered(sorted(jobs, key=lambda j: j.number % 50))
    shape = replace(SHAPE, pool=40_000)
    _, gaps, speed = raced({"long": 1.0, "short": 1.0}, jobs, shape)
    part = gaps.part(lambda quota: gap_bound(shape, longest_of(jobs)) / quota)
    says = f"speed relative to first come, first served; the gap is {part:.2f} of its bound; no empty plan"
    return Row(speed, SPEED, speed >= SPEED and part <= 1.0, 1, says)


def cached_hog() -> Row:
    """100k cached contexts that ask for long answers, against short chats: tokens a second beside first come."""
    make, rng = Maker(), random.Random(9)
    jobs: list[Job] = []
    for i in range(24):
        jobs += make("hog", 100_016, 400, at=0.0 if i < 4 else 6.0, prefix=i % 4, prefix_tokens=100_000)
    for i in range(900):
        jobs += make("chat", rng.randint(50, 400), rng.randint(50, 200), at=i * 0.02)
    jobs = renumbered(jobs)
    shape = replace(SHAPE, prefix_caching=True, pool=470_000)
    _, gaps, speed = raced({"hog": 1.0, "chat": 1.0}, jobs, shape)
    part = gaps.part(lambda quota: gap_bound(shape, longest_of(jobs)) / quota)
    hits = sum(j.cached for j in jobs)
    says = (
        f"speed relative to first come, first served, with w_k; {hits} tokens cached; the gap is {part:.2f} of its "
        "bound"
    )
    return Row(speed, 0.9, speed >= 0.9 and part <= 1.0 and hits > 0, 1, says)


def mixed(pools: tuple[int, ...] = (20_000, 60_000, 437_000)) -> Row:
    """Six users, quotas 1 to 99, on and off; nobody stuck."""
    quotas = {"u0": 1.0, "u1": 5.0, "u2": 20.0, "u3": 20.0, "u4": 50.0, "u5": 99.0}
    worst = 0.0
    for pool in pools:
        rng, make = random.Random(pool), Maker()
        jobs: list[Job] = []
        for number, user in enumerate(quotas):
            now = 0.0
            while now < 30.0:
                now += rng.choice((0.02, 0.05, 0.1)) if (now // 5) % 2 == number % 2 else 1.0
                jobs += make(user, rng.randint(10, (200, 3000, 800)[number % 3]), rng.randint(5, 400), at=now)
        shape = replace(SHAPE, pool=pool)
        bench = ours(tiers(quotas), jobs, shape)
        gaps = Gaps(quotas)
        bench.each_step.append(gaps)
        bench.run(jobs)
        assert all(j.done for j in jobs), "somebody is stuck"
        worst = max(worst, gaps.part(lambda quota: gap_bound(shape, longest_of(jobs)) / quota))  # noqa: B023
    return at_most(
        worst, 1.0, "gap as part of its bound, pools of 20k, 60k and 437k; all requests complete", len(pools)
    )


def renumbered(jobs: list[Job]) -> list[Job]:
    """Numbers in the order of the list."""
    for number, job in enumerate(jobs):
        job.number = number
    return again(jobs)
