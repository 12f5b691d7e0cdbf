"""Cluster files and command lines: what is wrong is named, nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster.app
import cluster.config
from cluster.config import ClusterConfig, checked_config, read_cluster_config, resolve_model, threads_per_rank
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


SEVERAL = """
models:
  - {path: demo, replicas: 2}
  - {path: demo, name: wide, tensor_parallel: 2, engine: {max_num_seqs: 4, block_size: 8}, qos: own.json}
engine: {max_num_seqs: 64}
dispatch: {qos: all.json}
"""
TIERS = '{"user_groups": ["%s"], "user_group_map": {"%s": [{"id": "default", "quota_pct": 100}]}}'


def test_several_models_have_their_own_limits_and_share_the_rest(tmp_path: Path) -> None:
    for name, tier in (("all.json", "Gold"), ("own.json", "Silver")):
        (tmp_path / name).write_text(TIERS % (tier, tier))
    config = cluster_config(str(written(tmp_path, SEVERAL)), {"port": 4321})
    assert config.names == ("demo", "wide")
    assert [one.model.replicas for one in config.each] == [2, 1]
    assert all(one.names == (one.model_name,) and one.http.port == 4321 for one in config.each)
    demo, wide = (one.replica_config("cpu") for one in config.each)
    assert (demo.engine.max_num_seqs, demo.engine.block_size, demo.tensor_parallel) == (64, 16, 1)
    assert (wide.engine.max_num_seqs, wide.engine.block_size, wide.tensor_parallel) == (4, 8, 2)
    assert [one.dispatch.qos for one in config.each] == [str(tmp_path / "all.json"), str(tmp_path / "own.json")]
    dispatcher = config.dispatcher_config()
    assert dispatcher.models == ("demo", "wide")
    assert dispatcher.qos is not None
    assert [t.name for t in dispatcher.qos.tiers] == ["Gold"]
    assert {m: [t.name for t in qos.tiers] for m, qos in dispatcher.own_qos.items()} == {"wide": ["Silver"]}
    assert checked_config(config.model_dump(), "again") == config
    one = config.with_model(config.of("wide").model.model_copy(update={"replicas": 3}))
    assert [part.model.replicas for part in one.each] == [2, 3]
    with pytest.raises(ConfigError, match=r"no model 'nope'.* demo, wide"):
        config.of("nope")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models: [{path: demo}, {path: demo}]", "two models are called demo"),
        ("model: {path: demo}\nmodels: [{path: other}]", "exclude each other"),
        ("models: [{path: demo}, {path: a, replicas: 0}]", r"models\.1\.replicas"),
        ("models: demo", "models"),
    ],
)
def test_wrong_lists_of_models_are_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_cluster_config(written(tmp_path, text))


def test_a_flag_says_nothing_of_several_models(tmp_path: Path) -> None:
    path = written(tmp_path, "models: [{path: demo}, {path: demo, name: b}]")
    with pytest.raises(ConfigError, match="replicas of each"):
        cluster_config(str(path), {"replicas": 3})
    assert cluster_config(str(written(tmp_path, "models: [{path: demo}]")), {"replicas": 3}).each[0].model.replicas == 3


def test_models_share_cpus_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.config, "cpu_count", lambda: 12)
    big = {"path": "/big", "replicas": 2, "tensor_parallel": 2}
    config = checked_config({"models": [big, {"path": "demo"}, {"path": "/small", "device": "cpu"}]}, "test")
    assert threads_per_rank(config) == 2

    def devices(gpus: int) -> list[str]:
        monkeypatch.setattr(cluster.app.ray, "cluster_resources", lambda: {"GPU": float(gpus)})
        return list(cluster.app.choose_devices(config).values())

    assert devices(0) == ["cpu", "cpu", "cpu"]
    assert devices(4) == ["cuda", "cpu", "cpu"]
    assert devices(5) == ["cuda", "cuda", "cpu"]
    with pytest.raises(ConfigError, match="2 replicas of big on 2 GPUs each need 4, Ray sees 3: take fewer"):
        devices(3)
    config = checked_config({"models": [big, {"path": "/small"}]}, "test")
    with pytest.raises(ConfigError, match=r"of small .* need 1, Ray sees 4, 4 of them for the models before it"):
        devices(4)


def test_a_model_that_is_nearly_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "internlm2-chat").mkdir()
    with pytest.raises(ConfigError, match=f"did you mean {tmp_path}/internlm2-chat"):
        resolve_model(str(tmp_path / "internlm-chat"))
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_model(str(tmp_path / "models" / "internlm-chat"))
