"""Replicas that leave on purpose, on a running cluster: nobody who is served notices."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from watching import await_true

from cluster.environment import prepare_ray

pytestmark = [pytest.mark.ray, pytest.mark.long]

SLOTS = 127  # one less than before: as good for the tests that come after
COUNT: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


class Crowd:
    """Threads that ask the same things again and again until `stop`; what they got, by what they asked."""

    def __init__(self, cluster: Any, size: int = 4) -> None:
        self._cluster, self._over = cluster, threading.Event()
        self.said: dict[str, set[str]] = {}
        self.answers = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(size)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        text = f"Count from {number} to 20."
        said = self.said.setdefault(text, set())
        while not self._over.is_set():
            try:
                said.add(text_of(self._cluster.chat(text, max_tokens=40 + 20 * number, **COUNT)))
                self.answers += 1
            except Exception as e:  # the test reports it
                self.failures.append(f"{type(e).__name__}: {e}")
                return

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_replicas_are_replaced_under_load_without_an_error(cluster: Any) -> None:
    """An upgrade, whose old replicas wait for what runs; then a new one, which waits for nothing, is drained."""
    prepare_ray()
    import ray

    from cluster.app import version_of
    from cluster.gateway_actor import Served
    from cluster.names import GATEWAY, NAMESPACE
    from cluster.upgrade import roll_out

    gateway = ray.get_actor(GATEWAY, namespace=NAMESPACE)
    runs: Served = ray.get(gateway.served.remote())
    before = {r.info.id for r in cluster.ready()}
    section = runs.config.model.model_copy(update={"drain_timeout": 0.0})
    engine = runs.config.engine.model_copy(update={"max_num_seqs": SLOTS})
    config = runs.config.model_copy(update={"model": section, "engine": engine})
    version = version_of(config.replica_config("cpu"), None)
    crowd = Crowd(cluster)
    try:
        roll_out(Served(config, runs.secret, version), runs, "cpu", lambda text: None)
        await_true(lambda: len(cluster.ready()) == 2, "two new replicas should be ready")
    finally:
        crowd.stop()
    assert not crowd.failures
    assert crowd.answers > 8
    assert all(len(texts) == 1 for texts in crowd.said.values()), crowd.said
    rows = cluster.ready()
    assert not before & {r.info.id for r in rows}
    assert {r.info.max_num_seqs for r in rows} == {SLOTS}
    ray.get(gateway.upgraded.remote(Served(config, runs.secret, version)))

    answers: list[dict[str, Any]] = []
    long = threading.Thread(target=lambda: answers.append(cluster.chat("Count from 1 to 20.", max_tokens=900, **COUNT)))
    long.start()
    await_true(lambda: any(r.leases for r in cluster.rows()) or answers, "the long answer did not begin")
    victim = max(cluster.rows(), key=lambda r: r.leases).info.id
    assert ray.get(cluster.dispatcher().retire.remote(victim))
    long.join(timeout=60)
    assert answers[0]["usage"]["completion_tokens"] == 900
    await_true(lambda: victim not in {r.info.id for r in cluster.rows()}, "the drained replica is still there")
