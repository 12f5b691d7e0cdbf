"""Tiers and shares through the whole path: ingress, dispatcher, and engines whose steps the policy orders.

Mutants seen to fail: see each test.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cluster_site import Site, asking, until

from router.qos.file import make_qos_config
from router.qos.source import parse_source

TIERS = """
user_groups: [Platinum, Bronze]
user_group_map:
  Platinum: [{id: vip, quota_pct: 100}]
  Bronze: [{id: crowd, quota_pct: 100}]
"""
OFF = "enable_user_qos: false\nuser_groups: [all]\nuser_group_map: {all: [{id: default, quota_pct: 1}]}"


def two(first: int, second: int) -> str:
    line = f"[{{id: a, quota_pct: {first}}}, {{id: b, quota_pct: {second}}}]"
    return f"user_groups: [one]\nuser_group_map: {{one: {line}}}"


async def test_a_flood_of_the_lower_tier_costs_the_higher_one_no_more_than_the_step_in_flight() -> None:
    async with Site(TIERS) as site, asking(*(site.ask(f"c{i}", "crowd", output=200) for i in range(50))):
        engine, order = site.running[0].harness.engine, site.running[0].order
        await until(lambda: len(engine.roster.residents) == site.slots and engine.stats.decode > 50)
        for number in range(5):
            asked = await site.ask(f"vip{number}", "vip", output=6)
            assert len(asked) == 6
        waits = {n: order.first_at[n] - step for n, step in order.arrived_at.items() if n.startswith("vip")}
        assert len(waits) == 5
        # Planned one step ahead: the step in flight, then its own one. Somebody yields for it unless a slot is free.
        assert max(waits.values()) <= 2, waits


async def test_tiers_switched_on_while_it_runs() -> None:
    """The lower tier yields as soon as dispatcher and engine have read the file; at the end the books of both agree.

    Mutant seen to fail: what was charged under old names is not reported.
    """
    tiers = make_qos_config(parse_source(TIERS, "f", as_json=False))
    async with Site(OFF) as site:
        engine, order = site.running[0].harness.engine, site.running[0].order
        site.server.reload(tiers)
        async with asking(*(site.ask(f"c{i}", "crowd", output=200) for i in range(300))) as crowd:
            await until(lambda: len(engine.roster.residents) == site.slots and engine.stats.decode > 50)
            site.running[0].server.between_steps(lambda: order.replace(tiers))
            assert len(await site.ask("vip", "vip", output=6)) == 6
            assert not all(task.done() for task in crowd)  # else nobody yielded


@pytest.mark.parametrize(("first", "second"), [(95, 5), (50, 50)])
async def test_service_by_quota_drifts_apart_by_no_more_than_the_bound(first: int, second: int) -> None:
    async with Site(two(first, second), slots=8) as site:
        ours = [site.ask(f"a{i}", "a", prompt=30, output=12) for i in range(120)]
        theirs = [site.ask(f"b{i}", "b", prompt=6, output=30) for i in range(120)]
        async with asking(*(one for pair in zip(ours, theirs, strict=True) for one in pair)) as tasks:
            await until(lambda: sum(t.done() for t in tasks) >= 100)
        order, runs = site.running[0].order, [[0.0]]
        for units in order.samples:  # intervals through which both wait in the engine
            if len(units) == 2:
                runs[-1].append(units["a"] / first - units["b"] / second)
            elif runs[-1]:
                runs.append([])
        widest = max(max(run) - min(run) for run in runs if run)
        assert widest <= order.policy.limits.gap(min(first, second))


async def test_what_is_charged_is_what_was_executed_with_preemption_and_clients_that_leave() -> None:
    async with Site(TIERS, replicas=2, slots=2) as site:
        async with asking(*(site.ask(f"c{i}", "crowd", output=60) for i in range(12))):
            await until(lambda: site.executed > 200)
            await asyncio.gather(*(site.ask(f"vip{i}", "vip", output=4) for i in range(4)))
        assert site.executed > 200
        mine = [r.order.policy.ledger.accounts for r in site.running]
    # The site has checked that the dispatcher's books hold every executed token; and by account:
    totals = site.room.policy.ledger.accounts
    for key in (("Platinum", "vip"), ("Bronze", "crowd")):
        for what in ("prefill", "decode", "kv_read"):
            assert getattr(totals[key], what) == sum(getattr(m[key], what) for m in mine if key in m)


async def test_a_restarted_dispatcher_knows_what_was_served() -> None:
    async with Site(two(50, 50), slots=2) as site:
        await asyncio.gather(*(site.ask(f"a{i}", "a", output=30) for i in range(6)))
        await until(lambda: site.room.policy.ledger.executed == site.executed)

        def served() -> list[float]:
            return [x for s in site.room.policy.standings if s.account.id == "a" for x in (s.service, s.time)]

        before = served()
        assert before
        await site.stop_dispatcher()
        await site.start_dispatcher()
        await until(lambda: site.client.connected and served() == pytest.approx(before))
        await site.ask("b0", "b", output=3)


async def test_a_restarted_dispatcher_knows_what_was_served_before_accounts_moved() -> None:
    """`a` goes to another tier, `b` has no line any more; the books of the new dispatcher still hold every token.

    Mutants seen to fail: what was charged under names that are gone is not told; who took over pays for it.
    """
    lines = "{one: [{id: default, quota_pct: 5}], two: [{id: a, quota_pct: 2}]}"
    moved = make_qos_config(parse_source(f"user_groups: [one, two]\nuser_group_map: {lines}", "f", as_json=False))
    async with Site(two(50, 50), slots=2) as site:
        await asyncio.gather(*(site.ask(f"{user}{i}", user, output=30) for i in range(4) for user in "ab"))
        await until(lambda: site.room.policy.ledger.executed == site.executed)
        site.server.reload(moved)
        order = site.running[0].order
        site.running[0].server.between_steps(lambda: order.replace(moved))
        await asyncio.gather(*(site.ask(f"{user}{i}", user, output=30) for i in range(4, 6) for user in "ac"))
        await until(lambda: site.room.policy.ledger.executed == site.executed)

        def times() -> dict[tuple[str, str], float]:
            return {s.key: s.time for s in site.room.policy.standings if s.time}

        before = times()
        assert sorted(before) == [("one", "default"), ("two", "a")]
        await site.stop_dispatcher()
        site.dispatcher_config = replace(site.dispatcher_config, qos=moved)
        await site.start_dispatcher()
        await until(lambda: site.client.connected and site.room.policy.ledger.executed == site.executed)
        assert site.room.policy.ledger.missing == 0
        assert times() == pytest.approx(before)


async def test_replicas_learn_what_the_others_served() -> None:
    async with Site(two(50, 50), replicas=2, slots=2) as site:
        await asyncio.gather(*(site.ask(f"a{i}", "a", output=30) for i in range(8)))

        def times() -> list[float]:
            found = [r.order.policy.find(("one", "a")) for r in site.running]
            return [s.time for s in found if s is not None]

        await until(lambda: site.room.policy.ledger.executed == site.executed)
        total = sum(s.service for s in site.room.policy.standings if s.account.id == "a")
        await until(lambda: times() == pytest.approx([total / 50 / 2] * 2))
