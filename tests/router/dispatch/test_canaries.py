"""Canaries: who must make one, what it changes, and what it must not change."""

from __future__ import annotations

import math

import pytest

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Granted, ReplicaState
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport

from .fakes import Cluster, generation, until
from .virtual import Clock, ask, decode_steps, done, info, made

IDLE = LoadReport(7, free_blocks=100, total_blocks=100)


def idle_replica(**changes: float) -> tuple[Dispatcher, Clock]:
    d, clock = made(DispatcherConfig(recovery=0.0, canary_every=2.0, **changes))
    d.replica_up(info("a"))
    d.load("a", IDLE)
    return d, clock


def state(d: Dispatcher) -> ReplicaState:
    return d.rows()[0].state


def test_an_idle_replica_is_asked_at_once_and_again_when_its_proof_is_old() -> None:
    d, clock = idle_replica()
    assert d.rows()[0].since_step == math.inf
    assert d.canaries() == ["a"]
    clock.now += 5.0
    assert d.canaries() == []  # one is out
    d.canary("a", well=True)
    assert d.rows()[0].since_step == 0.0
    clock.now += 2.0
    assert d.canaries() == []
    clock.now += 0.1
    assert d.canaries() == ["a"]


def test_nobody_is_asked_who_has_work_drains_or_has_not_said_anything() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0))
    for name in ("silent", "leased", "running", "draining"):
        d.replica_up(info(name, model=name))
    for name in ("leased", "draining"):
        d.load(name, IDLE)
    d.load("running", LoadReport(7, running=1))
    d.acquire("i", ask("1", model="leased"))
    d.drain("draining")
    clock.now += 10.0
    assert d.canaries() == []
    d.settle(done("1"))
    assert d.canaries() == ["leased"]
    assert d.canary("nobody", well=True) == []


def test_real_steps_are_proof_enough() -> None:
    d, clock = idle_replica()
    d.load("a", LoadReport(8, 0.01, decode_tokens=1, running=1))
    clock.now += 1.9
    d.load("a", LoadReport(8))
    assert d.canaries() == []
    assert d.rows()[0].since_step == pytest.approx(1.9)


def test_a_canary_teaches_nothing_about_speed() -> None:
    d, _ = idle_replica()
    for report in decode_steps(0.01, first=8):
        d.load("a", report)
    d.load("a", LoadReport(17, 0.01))
    before = d.rows()[0].prefill_rate
    d.rows()[0]
    clock = d._clock
    assert isinstance(clock, Clock)
    clock.now += 3.0
    assert d.canaries() == ["a"]
    d.load("a", LoadReport(18, 5.0, prefill_tokens=1, decode_tokens=1))
    d.canary("a", well=True)
    assert d.rows()[0].prefill_rate == before
    d.load("a", LoadReport(19, 5.0, prefill_tokens=1))
    assert d.rows()[0].prefill_rate < before  # a real step does


def test_a_canary_that_does_not_come_makes_suspect_until_it_comes() -> None:
    d, clock = idle_replica(suspect_after=3.0)
    d.canaries()
    for _ in range(8):
        clock.now += 0.5
        d.load("a", IDLE)  # its loop turns, its device does not
        d.tick()
    assert state(d) is ReplicaState.SUSPECT
    assert d.acquire("i", ask("1")) is None
    (reply,) = d.canary("a", well=True)
    assert isinstance(reply.message, Granted)
    assert state(d) is ReplicaState.READY
    assert d.ledger().balanced


def test_a_failed_canary_makes_suspect_until_one_is_well() -> None:
    d, clock = idle_replica()
    d.canaries()
    d.load("a", LoadReport(8, 0.01, prefill_tokens=1))
    d.canary("a", well=False)
    assert d.rows()[0].since_step == math.inf
    d.load("a", LoadReport(8))
    d.tick()
    assert state(d) is ReplicaState.SUSPECT
    assert d.canaries() == []  # not at once again
    clock.now += 2.1
    d.load("a", LoadReport(8))
    assert d.canaries() == ["a"]
    d.canary("a", well=True)
    assert state(d) is ReplicaState.READY


def test_never_is_infinite_and_less_than_nothing_is_refused() -> None:
    d, clock = made(DispatcherConfig(recovery=0.0, canary_every=math.inf))
    d.replica_up(info("a"))
    d.load("a", IDLE)
    clock.now += 1e9
    assert d.canaries() == []
    with pytest.raises(ConfigError):
        DispatcherConfig(canary_every=0.0)


QUICK = DispatcherConfig(canary_every=0.05, suspect_after=0.1)


async def test_idle_engines_make_tokens_that_are_nobodys() -> None:
    async with Cluster(config=QUICK) as cluster:
        for engine in cluster.engines:
            engine.idle_steps = False
        await until(lambda: all(len(e.submitted) >= 3 for e in cluster.engines))
        await until(lambda: all(r.since_step < math.inf for r in cluster.client.rows))
        assert {(r.owner, r.prompt_ids, r.sampling.max_tokens) for e in cluster.engines for r in e.submitted} == {
            ("", (0,), 1)
        }
        ledger = cluster.server.ledger()
        assert (ledger.acquired, ledger.late, ledger.balanced) == (0, 0, True)


async def test_a_hung_engine_is_suspect_and_requests_go_elsewhere() -> None:
    async with Cluster(config=QUICK) as cluster:
        hung, well = cluster.engines
        for engine in cluster.engines:
            engine.idle_steps = False
        await until(lambda: all(e.submitted for e in cluster.engines))
        hung.hold = True

        def states() -> dict[str, ReplicaState]:
            return {r.info.id: r.state for r in cluster.server.status().rows}

        await until(lambda: states() == {hung.id: ReplicaState.SUSPECT, well.id: ReplicaState.READY})
        await cluster.sessions.generate(generation("a"), lambda batch: True)
        assert not [r for r in hung.submitted if r.id.startswith("a/")]
        hung.hold = False
        await until(lambda: set(states().values()) == {ReplicaState.READY})


async def test_an_engine_whose_steps_fail_is_suspect() -> None:
    async with Cluster(1, config=QUICK) as cluster:
        engine = cluster.engines[0]
        engine.idle_steps = False
        engine.fail_with = "rank 0: logits are not finite"
        await until(lambda: cluster.server.status().rows[0].state is ReplicaState.SUSPECT)
        await until(lambda: cluster.server.status().rows[0].state is ReplicaState.READY)
        assert len(engine.submitted) >= 2


def test_a_replica_whose_canaries_fail_for_ever_is_to_be_replaced() -> None:
    d, clock = idle_replica(replace_failures=3)
    for failure in range(3):
        assert d.hopeless("a") is None
        clock.now += 3.0
        d.tick()
        assert d.canaries() == ["a"], failure
        d.canary("a", well=False)
    assert d.hopeless("a") == "3 canaries failed, one after the other"
    clock.now += 3.0
    d.canaries()
    d.canary("a", well=True)
    assert d.hopeless("a") is None
    assert d.hopeless("nobody") is None


def test_failures_between_good_canaries_are_no_reason() -> None:
    d, clock = idle_replica(replace_failures=2)
    for well in (False, True) * 4:
        clock.now += 3.0
        d.tick()
        assert d.canaries() == ["a"]
        d.canary("a", well=well)
        assert d.hopeless("a") is None


def test_a_suspect_that_stays_one_is_to_be_replaced() -> None:
    """No step, and no canary that comes back: nothing fails, but nothing is done, either."""
    d, clock = idle_replica(suspect_after=3.0, replace_after=20.0)
    assert d.canaries() == ["a"]
    for _ in range(40):
        clock.now += 0.5
        d.tick()
        assert d.hopeless("a") is None
    clock.now += 4.0
    d.tick()
    assert d.hopeless("a") == "it has been suspect for 20 s"
    d.canary("a", well=True)
    d.tick()
    assert d.hopeless("a") is None


async def test_the_answer_to_an_announcement_tells_it() -> None:
    async with Cluster() as cluster:
        (engine, *_) = cluster.engines
        await until(lambda: len(cluster.server.status().rows) == len(cluster.engines))
        assert cluster.server.register(engine.info).replace is None
        for _ in range(5):
            cluster.server.replica_canary(engine.info.id, "rank 0: the step failed")
        assert cluster.server.register(engine.info).replace == "5 canaries failed, one after the other"
