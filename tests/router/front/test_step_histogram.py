"""The light histogram shows what prometheus_client's shows."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from router.step_histogram import StepHistogram

BOUNDS = (0.001, 0.0025, 0.1, 1.0, 10.0)


def test_the_page_is_that_of_prometheus_client():
    light, theirs = CollectorRegistry(), CollectorRegistry()
    ours = StepHistogram("h_seconds", "What it is.", ("model", "tier"), BOUNDS)
    light.register(ours)
    reference = Histogram("h_seconds", "What it is.", ("model", "tier"), buckets=BOUNDS, registry=theirs)
    rng = random.Random(5)
    for _ in range(500):
        labels = (rng.choice("ab"), rng.choice("xy"))
        value = rng.choice([*BOUNDS, 0.0, 11.0, rng.expovariate(2.0)])
        ours.labels(*labels).observe(value)
        reference.labels(*labels).observe(value)
    lines = [
        sorted(x for x in generate_latest(r).decode().splitlines() if "_created" not in x) for r in (light, theirs)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 30
