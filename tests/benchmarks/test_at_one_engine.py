"""G1 and G4 at one engine in this process: the feed and its books on the demo model, and what is made of the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf

import pytest
from in_process import conservation, isolation
from in_process.feed import Fed, Plant, Step, _off, requests_of
from in_process.isolation import Isolation, Load
from load.engine_target import load_rank
from simulation.jobs import Job, Maker

from router.qos.config import QosConfig
from router.qos.policy import Limits, Policy
from workers.api.config import EngineConfig
from workers.api.ordering import Charge


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(load_rank("demo", EngineConfig(max_num_seqs=4, max_num_batched_tokens=64), threads=1))


def test_a_trace_runs_to_its_end_and_the_books_balance(plant: Plant) -> None:
    for config in (conservation.quotas(), None):
        jobs = conservation.trace(0, 6, divide=24)
        fed = plant.run(config, jobs, blocks=12)
        assert [j.emitted for j in jobs] == [j.output for j in jobs]
        assert (fed.off_books, fed.empty_plans) == (0, 0)
        # The last token of each is drawn, but never run.
        assert sum(s.prefill + s.decode for s in fed.steps) == sum(j.prompt + j.output - 1 for j in jobs)


def test_what_is_live_at_the_end_is_aborted(plant: Plant) -> None:
    make = Maker()
    jobs = make("crowd", 60, 1000, n=6) + make("vip", 20, 4, at=1e6)
    fed = plant.run(isolation.tiers(0.025, 0.018), jobs, until=0.05)
    assert fed.off_books == 0
    assert fed.steps
    assert all(j.emitted < 1000 for j in jobs)
    assert jobs[-1].ended is None  # it never came


def test_lost_charges_show() -> None:
    config = conservation.quotas()
    policy = Policy(config, Limits(step=100.0))
    a, b = (policy.standing(config.account(user)) for user in "ab")
    policy.commit(12, [Charge(a, 5, 2), Charge(b, 4, 0, 0, 1)])
    assert _off(policy, Counter(a=7, b=4)) == 0
    assert _off(policy, Counter(a=7, b=6)) == 2
    policy.commit(3, [])
    assert _off(policy, Counter(a=7, b=4)) == 3


def test_prompts_share_no_block() -> None:
    jobs = Maker()("crowd", 40, 1, n=2000)
    requests = requests_of(jobs, 300)
    assert {len(r.prompt_ids) for r in requests} == {40}
    assert len({r.prompt_ids[:2] for r in requests}) == 2000
    assert all(10 <= t < 300 for r in requests for t in r.prompt_ids)


def test_the_upper_tier_asks_the_same_beside_any_flood() -> None:
    load = Load(every=0.5, seconds=20.0).divided(10)
    alone, beside = load.jobs(None), load.jobs(load.prompts)
    vips = [j for j in beside if j.user == "vip"]
    assert [(j.arrived, j.prompt, j.output) for j in alone] == [(j.arrived, j.prompt, j.output) for j in vips]
    assert {(j.prompt, j.output) for j in vips} == {(60, 6)}
    assert 25 <= len(vips) <= 55
    crowd = [j for j in beside if j.user == "crowd"]
    assert len(crowd) == 50 * 20.0 / 0.5
    assert {(j.prompt, j.output) for j in crowd} == {(400, 5)}


def test_a_request_without_a_first_token_waited_until_the_end() -> None:
    jobs = Maker()("vip", 10, 4, n=2, at=1.0, every=1.0)
    jobs[0].emit(1, 1.25)
    jobs[0].emit(1, 1.5)
    steps = [Step(0.5, 0.1, 7, 0, 0), Step(2.0, 0.3, 10, 10, 0), Step(5.0, 0.1, 0, 10, 30)]
    got = Isolation.of(Fed(5.0, steps), jobs)
    assert (got.first, got.gaps) == ([0.25, 3.0], [0.25])
    assert got.tokens == 30 / 4.0
    assert got.fed.longest == 0.3
    assert got.fed.recomputed == pytest.approx(0.1 * 0.75 / 0.5)


@pytest.mark.parametrize(("first", "gap", "missed"), [(0.2, 0.02, 0), (0.31, 0.02, 1), (0.2, 0.026, 1)])
def test_what_is_beyond_a_bound_is_missed(first: float, gap: float, missed: int) -> None:
    got = Isolation([0.1, first, first], [gap] * 9, 80.0, Fed(5.0, [Step(0.5, 0.1, 7, 0, 0)]))
    assert sum(f.missed for f in isolation.beside("x", got, 100.0, 0.3, 0.025)) == missed


class Told(Plant):
    """Tells how long runs took instead of running them."""

    def __init__(self, ours: float, theirs: float) -> None:
        self._took = {True: ours, False: theirs}
        self.asked: list[tuple[bool, int | None, int]] = []

    def run(
        self, config: QosConfig | None, jobs: Sequence[Job], *, until: float = inf, blocks: int | None = None
    ) -> Fed:
        self.asked.append((config is not None, blocks, len(jobs)))
        return Fed(self._took[config is not None], [Step(1.0, 1.0, 97, 0, 3)])


def test_pairs_take_turns_and_slow_ones_are_missed() -> None:
    told = Told(10.0, 9.5)
    whole, small = conservation.measure(told, pairs=2, requests=10, divide=1, block=16)
    assert [ours for ours, _, _ in told.asked] == [False, True, True, False] * 2
    assert [(blocks, jobs) for _, blocks, jobs in told.asked] == [(None, 10)] * 4 + [(427, 4)] * 4
    assert {f.name.split(": ")[1] for f in whole if f.missed} == {
        "speed, of first come, first served",
        "busy time that ran tokens again, at most",
    }
    assert [f.name.split(": ")[1] for f in small if f.missed] == ["speed, of first come, first served"]
