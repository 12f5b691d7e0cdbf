"""One cluster for all Ray tests, on an own local Ray: the demo model on two replicas, and as a second one on one."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from watching import await_true

from cluster.environment import free_port, prepare_ray

MODEL, SECOND = "demo", "second"
SPARE_CPUS = 2  # logical ones, for a gang of two ranks beside the two replicas
NO_TIERS = {
    "enable_user_qos": False,
    "user_groups": ["all"],
    "user_group_map": {"all": [{"id": "default", "quota_pct": 100}]},
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster and how tests look inside."""

    base_url: str
    secret: str
    qos_file: Path  # first come, first served; who writes another one puts it back

    def post(self, path: str, body: dict[str, Any], timeout: float = 60) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one POST."""
        request = urllib.request.Request(
            self.base_url + path, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def chat(self, text: str, **body: Any) -> dict[str, Any]:
        """A chat of one turn that must succeed."""
        messages = [{"role": "user", "content": text}]
        status, answer = self.post("/chat/completions", {"model": MODEL, "messages": messages, **body})
        assert status == 200, answer
        return answer

    def dispatcher(self) -> Any:
        """The dispatcher's actor."""
        import ray

        from cluster.names import DISPATCHER, NAMESPACE

        return ray.get_actor(DISPATCHER, namespace=NAMESPACE)

    def rows(self, model: str = MODEL) -> list[Any]:
        """The dispatcher's table of the replicas of `model`."""
        import ray

        return [r for r in ray.get(self.dispatcher().status.remote(), timeout=30).rows if r.info.model == model]

    def ready(self, model: str = MODEL) -> list[Any]:
        """The rows of replicas that take leases."""
        return [r for r in self.rows(model) if r.state == "ready"]

    def check_ledgers(self) -> None:
        """Leases, requests and blocks all balance, and nothing is left behind."""
        import ray

        def settled() -> bool:
            ledger = ray.get(self.dispatcher().ledger.remote(), timeout=30)
            assert ledger.balanced, ledger
            rows = [*self.ready(), *self.ready(SECOND)]
            assert all(r.load.requests.balanced for r in rows), rows
            idle = all(r.leases == 0 and r.load.requests.running == 0 for r in rows)
            return idle and ledger.held == 0 and all(r.load.free_blocks == r.load.total_blocks for r in rows)

        await_true(settled, "leases, sequences or blocks are left behind")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    prepare_ray()
    from cluster.app import await_running, bring_down, bring_up
    from cluster.config import ClusterConfig, DispatchSection, EngineSection, HttpSection, ModelSection

    qos = tmp_path_factory.mktemp("qos") / "tiers.json"
    qos.write_text(json.dumps(NO_TIERS))
    config = ClusterConfig(
        models=(
            ModelSection(path="demo", name=MODEL, replicas=2),
            ModelSection(path="demo", name=SECOND, engine=EngineSection(num_blocks=64, max_num_seqs=4)),
        ),
        http=HttpSection(port=free_port(), header_timeout=2.0, body_timeout=5.0),
        dispatch=DispatchSection(qos=str(qos)),
    )
    try:
        up = bring_up(config, address=None, progress=lambda text: None, spare_cpus=SPARE_CPUS)
        await_running(lambda text: None)
        yield Cluster(up.base_url, up.secret, qos)
    finally:
        bring_down(own_ray=True)


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The shared cluster with two ready replicas; its ledgers are checked at the end."""
    await_true(lambda: len(running.ready()) == 2, "two replicas should be ready")
    yield running
    running.check_ledgers()


@pytest.fixture
def await_replicas(running: Cluster) -> Callable[..., None]:
    """Wait for two ready replicas, none of them `without`."""

    def wait(without: str) -> None:
        def replaced() -> bool:
            ids = {r.info.id for r in running.ready()}
            return len(ids) == 2 and without not in ids

        await_true(replaced, f"replica {without} was not replaced")

    return wait
