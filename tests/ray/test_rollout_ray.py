"""Replicas that leave on purpose, on a running cluster: nobody who is served notices."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
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

    def __init__(self, cluster: Any, size: int = 4, model: str = "demo") -> None:
        self._cluster, self._over, self._model = cluster, threading.Event(), model
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
                said.add(text_of(self._cluster.chat(text, max_tokens=40 + 20 * number, model=self._model, **COUNT)))
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
    config = runs.config.with_model(section.model_copy(update={"engine": engine}))
    versions = {**runs.versions, "demo": version_of(config.replica_config("cpu"), None)}
    crowd = Crowd(cluster)
    try:
        roll_out("demo", Served(config, runs.secret, versions), runs, "cpu", lambda text: None)
        await_true(lambda: len(cluster.ready()) == 2, "two new replicas should be ready")
    finally:
        crowd.stop()
    assert not crowd.failures
    assert crowd.answers > 8
    assert all(len(texts) == 1 for texts in crowd.said.values()), crowd.said
    rows = cluster.ready()
    assert not before & {r.info.id for r in rows}
    assert {r.info.max_num_seqs for r in rows} == {SLOTS}
    ray.get(gateway.upgraded.remote(Served(config, runs.secret, versions)))

    drain(cluster)


def drain(cluster: Any) -> None:
    """`echelon drain` takes a replica out that has a long answer to make, which goes on elsewhere."""
    import ray

    answers: list[dict[str, Any]] = []
    long = threading.Thread(target=lambda: answers.append(cluster.chat("Count from 1 to 20.", max_tokens=900, **COUNT)))
    long.start()
    await_true(lambda: any(r.leases for r in cluster.rows()) or answers, "the long answer did not begin")
    victim = max(cluster.rows(), key=lambda r: r.leases).info.id
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "cluster.cli", "drain", victim, "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"replica {victim} is drained and gone" in done.stdout
    assert victim not in {r.info.id for r in cluster.rows()}
    long.join(timeout=60)
    assert answers[0]["usage"]["completion_tokens"] == 900


def test_requests_wait_while_the_only_replica_is_replaced_in_place(cluster: Any) -> None:
    prepare_ray()
    import ray

    from cluster.gateway_actor import Served
    from cluster.names import GATEWAY, NAMESPACE
    from cluster.upgrade import roll_out

    await_true(lambda: cluster.ready("second"), "the second model has no replica")
    runs: Served = ray.get(ray.get_actor(GATEWAY, namespace=NAMESPACE).served.remote())
    (before,) = cluster.rows("second")
    section = runs.config.of("second").model.model_copy(update={"upgrade": "stop_first", "drain_timeout": 0.0})
    wanted = dataclasses.replace(
        runs, config=runs.config.with_model(section), versions={**runs.versions, "second": "in place"}
    )
    crowd = Crowd(cluster, model="second")
    try:
        roll_out("second", wanted, runs, "cpu", lambda text: None)
        seen = crowd.answers
        await_true(lambda: crowd.answers > seen, "nobody is answered by the new replica")
    finally:
        crowd.stop()
    assert not crowd.failures
    (after,) = cluster.rows("second")
    assert after.info.id != before.info.id


def test_what_does_not_come_up_is_taken_back_and_nobody_notices(cluster: Any) -> None:
    prepare_ray()
    import ray

    from cluster.gateway_actor import Served
    from cluster.names import GATEWAY, NAMESPACE
    from cluster.upgrade import roll_out
    from workers.api.errors import EchelonError

    runs: Served = ray.get(ray.get_actor(GATEWAY, namespace=NAMESPACE).served.remote())
    before = {r.info.id for r in cluster.ready()}
    section = runs.config.of("demo").model.model_copy(update={"model_files": ("/absent.py",)})
    wanted = dataclasses.replace(
        runs, config=runs.config.with_model(section), versions={**runs.versions, "demo": "absent"}
    )
    said: list[str] = []
    crowd = Crowd(cluster)
    try:
        with pytest.raises(EchelonError, match=r"upgrade of demo was taken back.*absent\.py"):
            roll_out("demo", wanted, runs, "cpu", said.append)
        await_true(lambda: len(cluster.ready()) == 2, "two replicas should be ready")
    finally:
        crowd.stop()
    assert not crowd.failures
    assert crowd.answers > 8
    assert any(line.startswith("going back; ") for line in said)
    assert {r.info.id for r in cluster.ready()} == before, "no replica had to go: the new one was to come first"
