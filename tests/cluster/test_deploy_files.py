"""What lies in deploy/ fits what it names: metrics, cluster files, import paths."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema

from cluster import serve_file
from cluster.config import checked_config, read_cluster_config
from router.dispatch.lease import TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from router.engine_metrics import EngineMetrics
from router.http.status import ReplicaRow
from router.metrics import Metrics
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
NAME = re.compile(r"\b(?:vllm:|echelon_|qos_)\w+")


class Status:
    """One replica, one tier."""

    def replicas(self) -> list[ReplicaRow]:
        return [ReplicaRow("r0", "m", "ready", LoadReport(1, total_blocks=1), 0.5)]

    def waiting(self) -> dict[str, int]:
        return {"m": 0}

    def tiers(self) -> tuple[TierRow, ...]:
        return (TierRow("m", "Gold", 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),)

    def work(self) -> tuple[WorkRow, ...]:
        return (WorkRow("m", "Gold", "decode", 1),)

    def sessions(self) -> SessionCounts:
        return SessionCounts()


def exported() -> dict[str, set[str]]:
    """Labels by the name of each sample that a front can show, `front` aside."""
    metrics = Metrics()
    meter = metrics.request("m", "Gold", "anna", 1)
    meter.tokens(0, 1)
    meter.tokens(0, 1)
    meter.finished("stop")
    meter.close()
    metrics.queue_time.labels("m", "Gold").observe(0.0)
    metrics.ttft_error.labels("m").observe(0.0)
    metrics.replica_requests.labels("r0", "stop").inc()
    metrics.replays.labels("m").inc()
    metrics.refused("overloaded")
    meter.streamed(straight=True)
    pages = metrics.page(), EngineMetrics(Status()).page()  # type: ignore[arg-type]
    families = [f for page in pages for f in text_string_to_metric_families(page.decode())]
    return {sample.name: set(sample.labels) | {"front"} for family in families for sample in family.samples}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.name)
def test_dashboards_ask_for_metrics_that_there_are(path: Path) -> None:
    dashboard, known = json.loads(path.read_text()), exported()
    asked = [(e, name) for e in expressions(dashboard) for name in NAME.findall(e)]
    assert len(asked) >= len(dashboard["panels"])
    for expression, name in asked:
        assert name in known, expression
        for label in re.findall(r"(\w+) ?(?:=~|!=|=)", expression):
            assert label in known[name], expression
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_compose_cluster_file_is_valid() -> None:
    config = read_cluster_config(DEPLOY / "docker" / "cluster.yaml")
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    assert compose["services"]["head"]["ports"] == [f"127.0.0.1:{config.http.port}:{config.http.port}"]
    assert config.http.api_keys == "/run/secrets/api_keys"
    assert "ports" not in compose["services"]["worker"]


def test_kuberays_files_fit_each_other() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "kuberay" / "rayservice.yaml").read_text())}
    text = documents["ConfigMap"]["data"]["cluster.yaml"]
    config = checked_config(yaml.safe_load(text), "the ConfigMap")
    spec = documents["RayService"]["spec"]
    served = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    assert served.http_options.port == config.http.port
    for application in served.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    cluster = spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert "ECHELON_SECRET" in {variable["name"] for variable in container["env"]}
    grace = cluster["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.model.drain_timeout
    assert config.scaling() is not None


def test_a_serve_file_without_the_secret_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {device: cpu}\nhttp: {no_auth: true}\n")
    monkeypatch.setenv("ECHELON_SECRET", "short")
    with pytest.raises(ConfigError, match="ECHELON_SECRET"):
        serve_file.front({"file": str(file)})


def test_each_model_of_a_file_is_an_application_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    models = "models: [{path: demo, device: cpu}, {path: demo, name: b, device: cpu, replicas: 3}]"
    file.write_text(f"{models}\nhttp: {{no_auth: true}}\n")
    monkeypatch.setenv("ECHELON_SECRET", "s" * 32)
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve_file, "start_dispatcher", lambda config, *_, **__: started.append(config.models))

    def made(args: dict[str, str]) -> tuple[str, int]:
        deployment = serve_file.replicas({"file": str(file), **args})._bound_deployment
        return deployment.name, deployment.num_replicas

    assert made({}) == ("demo", 1)
    assert made({"model": "b"}) == ("b", 3)
    assert started == [("demo", "b")] * 2, "the dispatcher knows of all"
    with pytest.raises(ConfigError, match="no model 'c'"):
        made({"model": "c"})
