"""What is learned of a replica's speed, and of the length of answers."""

from __future__ import annotations

import random

import pytest

from router.dispatch.latency import OutputLengths, Speed, SpeedModel, blend
from workers.api.replica import LoadReport


def step(number: int, *, prefill: int, decode: int, kv: int, slow: float = 1.0, noise: float = 1.0) -> LoadReport:
    """A replica that takes 8 ms + 0.1 ms a sequence + 1 us a KV token, and prefills 10,000 tokens/s."""
    seconds = (0.008 + 0.0001 * decode + 1e-6 * kv + prefill / 10_000) * slow * noise
    return LoadReport(number, seconds, prefill, decode, running=decode, kv_tokens=kv)


def taught(rng: random.Random, steps: int = 400, slow: float = 1.0, into: SpeedModel | None = None) -> SpeedModel:
    model = into or SpeedModel(Speed())
    for i in range(steps):
        decode = rng.randrange(1, 64)
        kv = decode * rng.randrange(50, 400)
        prefill = rng.randrange(100, 2000) if i % 4 == 0 else 0
        model.observe(step(i, prefill=prefill, decode=decode, kv=kv, slow=slow, noise=rng.uniform(0.95, 1.05)))
    return model


def test_step_time_and_prefill_rate_are_learned() -> None:
    speed = taught(random.Random(0)).speed
    for decode, kv in ((1, 100), (32, 6000), (64, 20_000)):
        assert speed.step(decode, kv) == pytest.approx(0.008 + 0.0001 * decode + 1e-6 * kv, rel=0.1)
    assert speed.prefill_rate == pytest.approx(10_000, rel=0.1)


def test_a_constant_load_does_not_upset_it() -> None:
    """Nothing can be told of per-sequence costs here; the prediction at this load must hold all the same."""
    model = SpeedModel(Speed())
    for i in range(5000):
        model.observe(step(i, prefill=0, decode=8, kv=1000))
    assert model.speed.step(8, 1000) == pytest.approx(0.0098, rel=0.05)
    assert model.speed.step(9, 1100) == pytest.approx(0.010, rel=0.25)


def test_a_tenfold_slowdown_is_believed_within_ten_steps() -> None:
    rng = random.Random(1)
    model = taught(rng)
    taught(rng, steps=10, slow=10.0, into=model)
    assert model.speed.step(32, 6000) > 0.05
    assert model.speed.prefill_rate < 4000


def test_prefill_alone_teaches_a_rate() -> None:
    model = SpeedModel(Speed())
    model.observe(LoadReport(1, 0.5, prefill_tokens=1000))
    assert model.known
    assert model.speed.prefill_rate == pytest.approx(2000)


def test_empty_steps_teach_nothing() -> None:
    model = SpeedModel(Speed())
    model.observe(LoadReport(1, 0.5))
    model.observe(LoadReport(2, 0.0, decode_tokens=3))
    assert not model.known
    assert model.speed == Speed()


def test_blend_goes_from_one_to_the_other() -> None:
    a, b = Speed(1000.0, 0.01), Speed(4000.0, 0.03)
    assert blend(a, b, 0.0) == a
    assert blend(a, b, -1.0) == a
    assert blend(a, b, 1.0).prefill_rate == pytest.approx(4000.0)
    assert blend(a, b, 0.5).base == pytest.approx(0.02)


def test_output_lengths_by_owner_and_route() -> None:
    lengths = OutputLengths(seed=128.0)
    assert lengths.expected("alice", "chat", 1000) == 128.0
    assert lengths.expected("alice", "chat", 50) == 50.0
    for _ in range(50):
        lengths.observe("alice", "chat", 20)
        lengths.observe("bob", "chat", 400)
    assert lengths.expected("alice", "chat", 1000) == pytest.approx(20)
    assert lengths.expected("bob", "chat", 1000) == pytest.approx(400)
    assert 20 < lengths.expected("carol", "chat", 1000) < 400  # unknown owners are like the route's others
    assert lengths.expected("alice", "completions", 1000) == 128.0


def test_output_lengths_are_bounded() -> None:
    lengths = OutputLengths(limit=100)
    for i in range(1000):
        lengths.observe(f"user{i}", "chat", 10)
    assert len(lengths._by_key) <= 100
    assert lengths.expected("user999", "chat", 1000) == 10
