"""What each guarantee asserts, as functions, so that deliberately broken policies can be run through them too.

A check runs the fake engine with what it is given (`policy=`, `turns=` of `QosPlanner`) and raises AssertionError. All
figures come from the engine's own books, never from the policy's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import quantiles
from typing import Any

from router.qos.config import QosConfig

from .engine import Engine, Job
from .planners import FifoPlanner, QosPlanner, tiers

BUDGET = 2048


class Names:
    """Makes jobs with numbers that grow."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(
        self, user: str, prompt: int, output: int, *, n: int = 1, at: float = 0.0, every: float = 0.0, cached: int = 0
    ) -> list[Job]:
        first = self.count
        self.count += n
        return [Job(first + i, user, prompt, output, at + i * every, cached) for i in range(n)]


def made(config: QosConfig, jobs: list[Job], *, pool: int = 437_000, slots: int = 64, **planner: Any) -> Engine:
    """An engine, not yet run, that samples after each step."""
    longest = max((j.prompt + j.output for j in jobs), default=0)
    engine = Engine(QosPlanner(config, pool=pool, longest=longest, **planner), pool=pool, slots=slots)
    engine.sample = True
    return engine


def run(config: QosConfig, jobs: list[Job], *, until: float = float("inf"), **given: Any) -> Engine:
    engine = made(config, jobs, **given)
    engine.run(jobs, until=until)
    assert engine.empty_plans == 0, "an empty plan while work was there"
    return engine


def fifo(jobs: list[Job], *, pool: int, slots: int) -> Engine:
    """The same jobs, first come, first served."""
    again = [Job(j.name, j.user, j.prompt, j.output, j.arrived, j.cached) for j in jobs]
    engine = Engine(FifoPlanner(), pool=pool, slots=slots)
    engine.run(again)
    return engine


def runs_of_waiting(engine: Engine, a: str, b: str) -> Iterator[list[tuple[float, float]]]:
    """Service of both, after each step of every interval through which both wait."""
    run: list[tuple[float, float]] = []
    for _, units, waiting in engine.samples:
        if a in waiting and b in waiting:
            run.append((units.get(a, 0.0), units.get(b, 0.0)))
        elif run:
            yield run
            run = []
    if run:
        yield run


def widest(engine: Engine, quotas: dict[str, float], a: str, b: str) -> float:
    """The greatest change of the difference of service / quota over any interval through which both wait."""
    most = 0.0
    for run in runs_of_waiting(engine, a, b):
        gaps = [x / quotas[a] - y / quotas[b] for x, y in run]
        most = max(most, max(gaps) - min(gaps))
    return most


def bound(pool: int, longest: float, *, eviction: float | None = None) -> float:
    """2 (U + max(X, E) + w_p L), with this harness's own arithmetic."""
    step = 2.0 * BUDGET + 0.002 * pool
    return 2.0 * (step + max(step, step + longest if eviction is None else eviction) + longest)


def check_gaps(quotas: dict[str, float], jobs: list[Job], *, pool: int, slots: int, **planner: Any) -> float:
    """G2: over any interval. Returns the greatest gap as a part of its bound."""
    engine = run(tiers(quotas), jobs, pool=pool, slots=slots, **planner)
    assert len(engine.done) == len(jobs), "somebody is stuck"
    longest = max(j.prompt + j.output for j in jobs)
    worst = 0.0
    for a, b in combinations(quotas, 2):
        most = bound(pool, longest) / min(quotas[a], quotas[b])
        worst = max(worst, widest(engine, quotas, a, b) / most)
    assert worst <= 1.0, f"the gap is {worst:.2f} of its bound"
    return worst


def check_start(**planner: Any) -> float:
    """G2 from a common start, with work that is always admissible: (U + X) / min q. Returns the part of it reached."""
    make, quotas = Names(), {"a": 1.0, "b": 3.0, "c": 6.0}
    jobs = make("a", 900, 40, n=300) + make("b", 300, 90, n=600) + make("c", 30, 150, n=900)
    engine = run(tiers(quotas), jobs, until=5.0, slots=2000, pool=2_000_000, **planner)
    step = 2.0 * BUDGET + 0.002 * 2_000_000
    worst = 0.0
    for a, b in combinations(quotas, 2):
        for first in runs_of_waiting(engine, a, b):
            most = max(abs(x / quotas[a] - y / quotas[b]) for x, y in first)
            worst = max(worst, most * min(quotas[a], quotas[b]) / (2.0 * step))
            break
    assert worst <= 1.0, f"from a common start the gap is {worst:.2f} of its bound"
    return worst


def check_shares(quotas: dict[str, float], *, seconds: float = 60.0, **planner: Any) -> float:
    """G3: shares of useful service equal quotas under backlog; quota 0 gets leftovers only. Returns the worst error."""
    make, rng = Names(), random.Random(7)
    jobs: list[Job] = []
    for number, (user, quota) in enumerate(quotas.items()):
        left = 200_000 + 50_000 * seconds * quota / sum(quotas.values())  # units, more than it can get
        while left > 0:
            prompt = rng.choice(((20, 200, 1500), (1000, 4000), (10, 50))[number % 3])
            output = rng.choice(((10, 60, 200), (5, 20), (100, 300))[number % 3])
            jobs += make(user, prompt, output)
            left -= prompt + 2 * output
    engine = run(tiers(quotas), jobs, until=seconds, **planner)
    assert {j.user for j in engine.waiting} == set(quotas), "somebody ran out of work"
    total, weights = sum(engine.units.values()), sum(quotas.values())
    worst = max(abs(engine.units[u] / total - q / weights) for u, q in quotas.items())
    assert worst <= 0.01, f"a share is off by {worst:.3f}"
    return worst


def check_long_short(**planner: Any) -> tuple[float, float]:
    """The trace long_short: useful shares 50 +- 1, both finish, makespan. Returns error and speed."""
    make, pool = Names(), 130_000
    jobs = make("long", 30_000, 16, n=14) + make("short", 50, 200, n=900)
    random.Random(3).shuffle(jobs)
    for i, job in enumerate(jobs):
        job.name = i
    engine = run(tiers({"long": 50, "short": 50}), jobs, pool=pool, **planner)
    assert len(engine.done) == len(jobs)
    *_, last = runs_of_waiting(engine, "long", "short")
    error = abs(last[-1][0] / sum(last[-1]) - 0.5)
    longest = 30_016
    assert abs(last[-1][0] - last[-1][1]) <= max(0.02 * sum(last[-1]), longest), "shares of useful service"
    speed = fifo(jobs, pool=pool, slots=64).now / engine.now
    assert speed >= 0.97, f"{speed:.3f} of the speed of first come, first served"
    assert engine.repeat_seconds <= 0.02 * engine.busy
    return error, speed


def check_kv_decode(**planner: Any) -> float:
    """The trace kv_decode: a small pool, long answers against short ones; nobody is stuck. Returns the speed."""
    make, pool = Names(), 40_000
    jobs = make("long", 200, 4000, n=6) + make("short", 200, 100, n=250)
    jobs.sort(key=lambda j: j.name % 50)
    for i, job in enumerate(jobs):
        job.name = i
    quotas = {"long": 1.0, "short": 1.0}
    check_gaps(quotas, [Job(j.name, j.user, j.prompt, j.output, 0.0) for j in jobs], pool=pool, slots=64, **planner)
    engine = run(tiers(quotas), jobs, pool=pool, **planner)
    speed = fifo(jobs, pool=pool, slots=64).now / engine.now
    assert speed >= 0.97, f"{speed:.3f} of the speed of first come, first served"
    return speed


def check_speed(**planner: Any) -> float:
    """G4: makespan of a finite trace of one tier, pool >= 4 L. Returns the speed relative to FIFO's."""
    make, rng = Names(), random.Random(11)
    jobs: list[Job] = []
    for i in range(500):
        user = rng.choice("abcd")
        jobs += make(user, rng.randint(10, 3000), rng.randint(5, 250), at=i * 0.01)
    engine = run(tiers({"a": 10, "b": 20, "c": 30, "d": 40}), jobs, pool=40_000, **planner)
    speed = fifo(jobs, pool=40_000, slots=64).now / engine.now
    assert speed >= 0.97, f"{speed:.3f} of the speed of first come, first served"
    assert engine.repeat_seconds <= 0.02 * engine.busy, "recompute"
    return speed


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]


def check_tiers(*, tau: float = 0.018, **planner: Any) -> tuple[float, float, float]:
    """G1: what a flood of the lower tier costs the upper one. Returns TTFT and ITL (p99, unloaded and loaded)."""

    def platinum(make: Callable[..., list[Job]]) -> list[Job]:
        return make("vip", 600, 60, n=12, at=1.0, every=1.9)

    quiet, vip = [], platinum(Names())
    engine = run(tiers({"vip": 100}, {"flood": 100}), vip, pool=100_000, tau=tau)
    quiet = [j.first_token - j.arrived for j in vip if j.first_token is not None]
    quiet_gaps = [g for j in vip for g in j.gaps]
    make = Names()
    vip = platinum(make)
    flood = make("flood", 4000, 50, n=200, every=0.1) + make("flood", 100, 1500, n=400, every=0.04)
    engine = run(tiers({"vip": 100}, {"flood": 100}), vip + flood, pool=100_000, tau=tau, until=24.0, **planner)
    loaded = [j.first_token - j.arrived for j in vip if j.first_token is not None]
    gaps = [g for j in vip for g in j.gaps]
    assert len(loaded) == len(vip), "a request of the upper tier got no token"
    longest = engine.speed.step(BUDGET, 64, 100_000)
    prefill_steps = 1 + 600 // BUDGET
    most = p99(quiet) + longest + prefill_steps * tau
    assert p99(loaded) <= most, f"TTFT {p99(loaded):.3f}, {p99(quiet):.3f} unloaded"
    assert p99(gaps) <= max(1.3 * p99(quiet_gaps), 0.025), f"ITL {p99(gaps):.4f}, {p99(quiet_gaps):.4f} unloaded"
    return p99(loaded) - p99(quiet), p99(quiet_gaps), p99(gaps)


def check_floor(**planner: Any) -> float:
    """G5: a floor of 2 % under endless work of the tier above, and requests complete. Returns the share."""
    make = Names()
    jobs = make("vip", 1000, 100, n=2500) + make("bronze", 800, 200, n=40)
    config = tiers({"vip": 100}, {"bronze": 100}, T1={"min_share": 0.02})
    engine = run(config, jobs, pool=60_000, until=40.0, tau=0.0, **planner)
    assert any(j.user == "vip" for j in engine.waiting), "the upper tier ran out of work"
    assert any(j.user == "bronze" for j in engine.waiting), "the floor's tier ran out of work"
    share = engine.units["bronze"] / sum(engine.units.values())
    assert share >= 0.019, f"{share:.4f} of useful service"
    assert share <= 0.03, f"{share:.4f} of useful service, far more than asked for"
    assert any(j.user == "bronze" for j in engine.done), "no request completed"
    return share


def check_max_wait(**planner: Any) -> float:
    """G5: the lower tier's oldest request runs after `max_wait`, though the tier above never lets up."""
    make = Names()
    jobs = make("vip", 1000, 100, n=2500) + make("bronze", 800, 50, n=3, at=1.0)
    config = tiers({"vip": 100}, {"bronze": 100}, T1={"max_wait": 5.0})
    engine = run(config, jobs, pool=60_000, until=30.0, tau=0.0, **planner)
    first = min(j.first_token or 1e9 for j in jobs if j.user == "bronze")
    assert 6.0 <= first <= 6.5, f"the first token came at {first:.2f}"
    assert sum(j.user == "bronze" for j in engine.done) == 3
    return first


def check_return(**planner: Any) -> float:
    """G9: who returns from idle claims nothing for it and owes nothing lasting. Returns the part of the bound."""
    make, quotas = Names(), {"steady": 1.0, "guest": 1.0}
    jobs = (
        make("steady", 300, 100, n=1500)
        + make("guest", 300, 100, n=150, at=15.0)
        + make("guest", 300, 100, n=150, at=45.0)
    )
    engine = run(tiers(quotas), jobs, until=65.0, **planner)
    most = widest(engine, quotas, "steady", "guest") / bound(437_000, 400)
    assert most <= 1.0, f"after a return the gap is {most:.2f} of its bound"
    return most


def check_books(**planner: Any) -> Engine:
    """G8: users + overhead == executed, exactly, and the policy's books are the engine's."""
    make, rng = Names(), random.Random(5)
    jobs: list[Job] = []
    for i in range(160):
        cached = rng.choice((0, 0, 512))
        jobs += make(rng.choice("abz"), 600 + rng.randint(0, 2000), rng.randint(2, 300), at=i * 0.02, cached=cached)
    engine = made(tiers({"a": 1, "b": 2}, {"z": 1}), jobs, pool=12_000, slots=24, **planner)
    for part in range(0, 160, 8):
        engine.run(jobs[part : part + 8], steps=40)
        engine.cancel(rng.choice(jobs[: part + 8]))
    engine.run([])
    assert engine.repeated > 0
    assert any(j.evictions for j in jobs)
    planner_, ledger = engine.planner, engine.planner.policy.ledger  # type: ignore[attr-defined]
    assert ledger.missing == 0, f"{ledger.missing} tokens are nobody's"
    assert (ledger.executed, ledger.overhead) == (engine.executed, engine.repeated)
    assert {u: [t.prefill, t.decode, t.kv_read] for (_, u), t in ledger.accounts.items()} == dict(engine.useful)
    standings = [planner_.policy.standing(planner_.policy.config.account(u)) for u in "abz"]  # type: ignore[attr-defined]
    for standing in standings:
        assert abs(standing.pending) < 1e-6, "an expectation was never settled"
        assert abs(standing.service - engine.units[standing.account.id]) < 1e-6 * max(standing.service, 1.0)
        assert (standing.queued, standing.resident) == (0, 0)
    return engine
