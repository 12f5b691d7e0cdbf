"""Cluster files and command lines: what is wrong is named, nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ClusterConfig, checked_config, read_cluster_config, resolve_model
from cluster.environment import DEMO_MODEL
from cluster.placement import rank_bundles
from cluster.serving import cluster_config
from router.foreign.node import NodeSpec
from workers.api.errors import ConfigError

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_cluster_files_are_valid(path: Path) -> None:
    config = read_cluster_config(path)
    assert config.replica_config("cpu").engine.max_num_seqs == config.engine.max_num_seqs


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {replicas: 0}", "model.replicas"),
        ("model: {replica: 2}", "model.replica"),
        ("engine: {block_size: big}", "engine.block_size"),
        ("http: {port: 99999}", "http.port"),
        ("dispatch: {strategy: fastest}", "dispatch.strategy"),
        ("nonsense: 1", "nonsense"),
        ("model: [", "not YAML"),
        ("engine: {cache_fraction: 1.5}", "engine.cache_fraction"),
        ("model: {drain_timeout: -1}", "model.drain_timeout"),
        ("model: {upgrade: surge}", "model.upgrade"),
        ("model: {autoscaling: {}}", "model.autoscaling.max_replicas"),
        ("model: {autoscaling: {min_replicas: 0, max_replicas: 2}}", "model.autoscaling.min_replicas"),
        ("model: {autoscaling: {min_replicas: 3, max_replicas: 2}}", "min_replicas is over max_replicas"),
        ("model: {replicas: 4, autoscaling: {max_replicas: 3}}", "replicas is 4: outside"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_cluster_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        read_cluster_config(tmp_path / "absent.yaml")


def test_limits_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    config = read_cluster_config(written(tmp_path, "engine: {max_num_seqs: 64, max_num_batched_tokens: 32}"))
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        config.replica_config("cpu")


def test_autoscaling_begins_with_the_least_unless_told_otherwise(tmp_path: Path) -> None:
    text = "model: {autoscaling: {min_replicas: 2, max_replicas: 5, target_wait: 0.5}}"
    config = read_cluster_config(written(tmp_path, text))
    assert (config.model.replicas, config.model.most_replicas) == (2, 5)
    scaling = config.scaling()
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_wait) == (2, 5, 0.5)
    flagged = cluster_config(str(written(tmp_path, text)), {"replicas": 4})
    assert flagged.model.replicas == 4
    assert ClusterConfig().scaling() is None


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {replicas: 2, name: a}\nhttp: {port: 1234}")
    config = cluster_config(str(path), {"port": 4321, "replicas": 3})
    assert (config.http.port, config.model.replicas, config.model_name) == (4321, 3, "a")


def test_a_key_file_lies_beside_the_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = written(tmp_path, "http: {api_keys: keys.yaml}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cluster_config(str(path), {}).http.api_keys == str(tmp_path / "keys.yaml")
    assert cluster_config("../cluster.yaml", {}).http.api_keys == str(tmp_path / "elsewhere" / ".." / "keys.yaml")
    assert cluster_config(str(path), {"api_keys": "/other.yaml"}).http.api_keys == "/other.yaml"
    with pytest.raises(ConfigError, match=r"http: .*exclude each other"):
        cluster_config(str(written(tmp_path, "http: {api_keys: k, no_auth: true}")), {})


def test_the_name_follows_the_path() -> None:
    assert cluster_config("/models/My-Model/", {}).model_name == "My-Model"
    assert cluster_config("owner/model", {}).model_name == "model"
    assert ClusterConfig().model_name == DEMO_MODEL


def test_models_are_found_or_refused(tmp_path: Path) -> None:
    assert (resolve_model(DEMO_MODEL) / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ConfigError, match="neither a folder"):
        resolve_model("./not-here")


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"replicas": 0}, "model.replicas"), ({"port": 99999}, "http.port"), ({"name": 1}, "model.name")],
)
def test_wrong_flags_are_refused_by_name(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cluster_config("demo", flags)


def test_contradictions_are_found_before_anything_starts(tmp_path: Path) -> None:
    path = written(tmp_path, "engine: {block_size: 24}")
    with pytest.raises(ConfigError, match="power of two"):
        cluster_config(str(path), {})


def test_a_folder_has_a_name_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = cluster_config(".", {})
    assert (config.model_name, config.model.path) == ("My-Model", str(folder))


def test_what_is_no_hub_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="model hub"):
        resolve_model("owner/no such model")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="local folder"):
        resolve_model("owner/no-such-model")


def test_a_bundle_for_each_rank() -> None:
    config = cluster_config("demo", {})
    assert rank_bundles(config.replica_config("cpu")) == [{"CPU": 1.0}]
    two = config.model_copy(update={"model": config.model.model_copy(update={"tensor_parallel": 2})})
    assert rank_bundles(two.replica_config("cuda")) == [{"CPU": 1.0, "GPU": 1.0}] * 2


def test_nodes_of_the_file_reach_the_dispatcher_without_their_v1() -> None:
    node = {"url": "http://host:8000/v1/", "models": ["qwen"], "speed": 5000, "key": "secret"}
    config = checked_config({"dispatch": {"nodes": [node]}}, "f")
    assert config.dispatcher_config().nodes == (NodeSpec("http://host:8000", ("qwen",), 5000.0, "secret"),)
    assert "secret" not in repr(config)
    with pytest.raises(ConfigError, match="node's URL"):
        checked_config({"dispatch": {"nodes": [{"url": "host:8000"}]}}, "f").dispatcher_config()
