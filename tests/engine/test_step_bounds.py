"""What lower tiers may add to a step in which a higher one has work: tau and `itl_target`, in the plans of an engine.

Mutants seen to fail: tau of the start after a reload; the higher tier's own time not counted; `base` left out; plans
without turns that look at tau only; chunks cut, or counted, without what they look back on; no token where one with all
it looks back on takes longer.
"""

from __future__ import annotations

import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB

from router.qos.config import QosConfig
from router.qos.file import make_qos_config
from router.qos.policy import Limits
from router.qos.source import parse_source
from router.qos.steps import StepOrder
from workers.engine.cost import StepCost, StepPrices

PRICES = StepPrices(base=0.002, prefill=0.99e-4, row=4.9e-4, kv=0.0, pair=0.0)
LONG = [i * 7 % VOCAB for i in range(400)]


def config(more: str = "") -> QosConfig:
    users = "user_group_map: {top: [{id: vip, quota_pct: 1}], low: [{id: crowd, quota_pct: 1}]}"
    return make_qos_config(parse_source(f"user_groups: [top, low]\n{users}\n{more}", "f", as_json=False))


def site(more: str = "", prices: StepPrices = PRICES) -> tuple[Harness, StepOrder]:
    """An engine whose executor teaches nothing: steps cost what `prices` says."""
    order = StepOrder(config(more), Limits(step=10_000.0))
    harness = Harness(max_num_batched_tokens=300, num_blocks=1024, max_model_len=1024, ordering=order, step_ahead=False)
    harness.engine._scheduler._cost = StepCost(prices)  # type: ignore[attr-defined]
    return harness, order


def added(harness: Harness) -> int:
    """Tokens of the lower tier in the next step, which has one decode of the higher one."""
    before = len(harness.executor.plans)
    harness.step()
    (plan,) = harness.executor.plans[before:]
    counts = [s.count for s in plan.scheduled]
    assert counts[0] == 1
    return sum(counts[1:])


def beside_a_decode(more: str = "", prices: StepPrices = PRICES) -> tuple[Harness, StepOrder]:
    harness, order = site(more, prices)
    harness.submit(request("vip", [1, 2, 3], 60, owner="vip"))
    harness.step()
    harness.submit(request("crowd", LONG, 4, owner="crowd"))
    return harness, order


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ("", 181),  # 18 ms at 0.099 ms a token
        ("tau: 0.002", 20),
        ("tau: 0.004", 40),
        ("tau: 0", 0),
        ("tau: 0.004\ntiers: {top: {itl_target: 0.0062}}", 31),  # 5.58 ms; 2 of the step, 0.49 of its decode
        ("tau: 0.001\ntiers: {top: {itl_target: 0.0062}}", 10),
        ("tiers: {top: {itl_target: 0.001}}", 7),  # beyond its target by itself: 30 % of 2.49 ms
    ],
)
def test_a_prompt_of_the_lower_tier_beside_a_decode(more: str, tokens: int) -> None:
    harness, _ = beside_a_decode(more)
    assert added(harness) == tokens
    harness.drain()


def test_later_parts_of_a_prompt_are_shorter_for_what_they_look_back_on() -> None:
    harness, _ = beside_a_decode("tau: 0.004", StepPrices(base=0.002, prefill=0.5e-4, row=4.9e-4, kv=0.0, pair=1e-6))
    assert [added(harness) for _ in range(6)] == [52, 33, 26, 23, 20, 18]
    harness.drain()


@pytest.mark.parametrize("tau", [0.0001, 0.0003])
def test_a_prompt_goes_on_by_a_token_whatever_it_looks_back_on(tau: float) -> None:
    harness, _ = beside_a_decode(f"tau: {tau}", StepPrices(base=0.002, prefill=1e-4, row=4.9e-4, kv=0.0, pair=1e-3))
    assert [added(harness) for _ in range(40)] == [1] * 40
    harness.drain()


def test_a_changed_tau_holds_for_the_next_plan() -> None:
    harness, order = beside_a_decode("tau: 0.004")
    assert added(harness) == 40
    order.replace(config("tau: 0.001"))
    assert added(harness) == 10
    order.replace(config("tiers: {top: {itl_target: 0.005}}"))
    assert added(harness) == 20
    harness.drain()


@pytest.mark.parametrize(("more", "rows"), [("", 6), ("tau: 0.001", 2), ("tiers: {top: {itl_target: 0.0045}}", 3)])
def test_decodes_of_the_lower_tier_beside_one(more: str, rows: int) -> None:
    """Steps without any turn, too: all decode, and nobody waits."""
    harness, order = site()
    harness.submit(*(request(f"c{i}", [i + 1], 30, owner="crowd") for i in range(6)))
    harness.submit(request("vip", [9], 30, owner="vip"))
    harness.step()
    harness.step()
    order.replace(config(more))
    before = len(harness.executor.plans)
    harness.step()
    (plan,) = harness.executor.plans[before:]
    assert len(plan.scheduled) == 1 + rows
    harness.drain()
