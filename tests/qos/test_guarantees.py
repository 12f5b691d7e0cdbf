"""Guarantees G1 to G5, G8 and G9 of the policy, in a fake engine under a virtual clock; and that each test can fail.

`checks` has what is asserted. Below, every mutant is a policy with one planted defect, run through the check that must
catch it; a mutant that survives fails its test. The wide sweep is slow: `pytest tests/qos -m slow`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

from router.qos.config import Account
from router.qos.policy import Policy
from router.qos.standing import Standing
from router.qos.turns import Turns
from workers.api.ordering import Charge

from . import checks
from .engine import Job


def test_g1_a_flood_costs_a_higher_tier_one_step_and_tau_a_step() -> None:
    checks.check_tiers()


def test_g2_from_a_common_start() -> None:
    checks.check_start()


@pytest.mark.parametrize(
    "quotas", [{"a": 95, "b": 5}, {"a": 50, "b": 50}, {"a": 30, "b": 30, "c": 40}, {"a": 60, "b": 40, "z": 0}], ids=str
)
def test_g3_shares_equal_quotas(quotas: dict[str, float]) -> None:
    checks.check_shares(quotas, seconds=8.0)


@pytest.mark.slow
@pytest.mark.parametrize("quotas", [{"a": 95, "b": 5}, {"a": 50, "b": 50}, {"a": 30, "b": 30, "c": 40}], ids=str)
def test_g3_over_a_minute(quotas: dict[str, float]) -> None:
    checks.check_shares(quotas)


def test_g4_as_fast_as_first_come_first_served() -> None:
    checks.check_speed()


def test_g5_a_floor_is_kept_and_its_requests_complete() -> None:
    checks.check_floor()


def test_g5_the_oldest_request_runs_after_max_wait() -> None:
    checks.check_max_wait()


def test_g8_the_books_balance_with_cancels_preemption_and_cache_hits() -> None:
    checks.check_books()


def test_g9_a_return_from_idle_claims_nothing() -> None:
    checks.check_return()


@pytest.mark.slow
def test_trace_long_short() -> None:
    checks.check_long_short()


def test_trace_kv_decode() -> None:
    checks.check_kv_decode()


def traffic(seed: int, *, users: int, jobs: int) -> tuple[dict[str, float], list[Job], int, int]:
    """Quotas, jobs, pool, slots: any lengths, bursts and pauses, a pool that just holds the longest."""
    rng = random.Random(seed)
    quotas = {f"u{i}": float(rng.choice((1, 1, 5, 20, 99))) for i in range(users)}
    longest = rng.choice((300, 2000, 6000))
    made: list[Job] = []
    now = 0.0
    for i in range(jobs):
        now += rng.choice((0.0, 0.0, 0.0, 0.02, 0.5))
        output = rng.randint(1, longest // rng.choice((2, 10)))
        prompt = rng.randint(1, max(longest - output, 1))
        cached = rng.choice((0, 0, prompt // 2))
        made.append(Job(i, rng.choice(list(quotas)), prompt, output, now, cached))
    pool = rng.choice((longest + 400, 4 * longest, 40 * longest))
    return quotas, made, pool, rng.choice((2, 8, 64))


@pytest.mark.parametrize("seed", range(8))
def test_g2_gap_and_no_livelock_on_any_traffic(seed: int) -> None:
    quotas, made, pool, slots = traffic(seed, users=2 + seed % 4, jobs=5 + 3 * seed)
    checks.check_gaps(quotas, made, pool=pool, slots=slots)


@pytest.mark.slow
def test_g2_on_many_traces() -> None:
    worst = 0.0
    for seed in range(100, 108):
        quotas, made, pool, slots = traffic(seed, users=2 + seed % 5, jobs=20 + seed % 60)
        worst = max(worst, checks.check_gaps(quotas, made, pool=pool, slots=slots))
    print(f"8 traces, the greatest gap {worst:.3f} of its bound")


# planted defects


class NoLift(Policy):
    """An idle account keeps its claim."""

    def _lift(self, standing: Standing) -> None:
        pass


class ZeroFirst(Policy):
    """LMDeploy's: usage / quota of a user with quota 0 was taken for 0."""

    def standing(self, account: Account) -> Standing:
        found = super().standing(account)
        if account.quota == 0.0:
            found.band, found.weight = 2 * account.tier.rank, 1e9
        return found


class FlatCharges(Policy):
    """LMDeploy's: every request costs the same."""

    def commit(
        self, executed: int, charges: Sequence[Charge], provisional: Mapping[Standing, float] | None = None
    ) -> None:
        super().commit(executed, [Charge(c.flow, 1 if c.prefill or c.decode else 0) for c in charges], provisional)


class LostSettlement(Policy):
    """What was expected of a step is not taken back."""

    def commit(
        self, executed: int, charges: Sequence[Charge], provisional: Mapping[Standing, float] | None = None
    ) -> None:
        super().commit(executed, charges, dict(list((provisional or {}).items())[1:]))


class ChargesRecompute(Policy):
    """An evicted user pays for what it must run again."""

    def commit(
        self, executed: int, charges: Sequence[Charge], provisional: Mapping[Standing, float] | None = None
    ) -> None:
        charges = [c._replace(prefill=c.prefill + c.overhead, overhead=0) for c in charges]
        super().commit(executed, charges, provisional)


class FreeReads(Policy):
    """Tokens that decodes read cost nothing."""

    def commit(
        self, executed: int, charges: Sequence[Charge], provisional: Mapping[Standing, float] | None = None
    ) -> None:
        super().commit(executed, [c._replace(kv_read=0) for c in charges], provisional)


class OneTier(Policy):
    """Tiers mean nothing: LMDeploy's queue in front of slots that were never waited for."""

    def standing(self, account: Account) -> Standing:
        found = super().standing(account)
        found.band = 0
        return found


class EvictsForRank(Policy):
    """Whoever is ahead by anything yields."""

    def victim(
        self, needy: Standing, holders: Iterable[Standing], *, distance: float, urgent: bool = False
    ) -> Standing | None:
        return super().victim(needy, holders, distance=0.0, urgent=urgent)


class NeverYields(Policy):
    """Nobody gives up a slot or a block to another tier."""

    def victim(
        self, needy: Standing, holders: Iterable[Standing], *, distance: float, urgent: bool = False
    ) -> Standing | None:
        same = [h for h in holders if h.band == needy.band]
        return super().victim(needy, same, distance=distance, urgent=urgent)


class NoTau(Turns):
    """Lower tiers fill each step."""

    def _left(self) -> float:
        return 1e9


class NoFloors(Turns):
    """What a tier is owed is not looked at."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._walks = self._walks[1:]


class NoOverdue(Turns):
    """`max_wait` is not looked at."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._overdue = []


def shares_with_leftovers(**planner: Any) -> float:
    return checks.check_shares({"a": 60, "b": 40, "z": 0}, seconds=10.0, **planner)


def even_shares(**planner: Any) -> float:
    return checks.check_shares({"a": 95, "b": 5}, seconds=10.0, **planner)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (NoLift, checks.check_return),
        (ZeroFirst, shares_with_leftovers),
        (FlatCharges, even_shares),
        (LostSettlement, checks.check_books),
        (ChargesRecompute, checks.check_books),
        (FreeReads, checks.check_books),
        (OneTier, checks.check_tiers),
        (NeverYields, checks.check_tiers),
        (EvictsForRank, checks.check_speed),
        (NoTau, checks.check_tiers),
        (NoFloors, checks.check_floor),
        (NoOverdue, checks.check_max_wait),
    ],
    ids=lambda x: x.__name__,
)
def test_each_planted_defect_is_caught(mutant: type, check: Callable[..., object]) -> None:
    given = {"turns" if issubclass(mutant, Turns) else "policy": mutant}
    with pytest.raises(AssertionError):
        check(**given)
