"""The files of deploy/ray-up: Ray's schema takes them, and what they name is there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import read_cluster_config
from cluster.down import UpFile
from workers.api.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "deploy/ray-up"
CLOUDS = ("aws.yaml", "gcp.yaml")


def schema() -> Any:
    """Ray's own, without importing Ray."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    return json.loads(Path(found.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text())


@pytest.mark.parametrize("name", ["local.yaml", *CLOUDS])
def test_ray_takes_it(name: str) -> None:
    data = yaml.safe_load((FOLDER / name).read_text())
    jsonschema.validate(data, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"no_such_key": 1}, schema())
    for here in data["file_mounts"].values():
        if here.endswith("cluster.yaml"):
            config = read_cluster_config(FOLDER.parents[1] / here)
            assert config.http.api_keys is not None
    for part in ("head", "worker"):
        last = data[f"{part}_start_ray_commands"][-1]
        assert last.startswith('made="$(echelon node ~/echelon/cluster.yaml)" && eval "$made" && ')
    head = data["head_start_ray_commands"][-1]
    assert "--detach" in head
    # Clouds start every worker with either version of the autoscaler; hosts given by address only with the first.
    assert ("RAY_enable_autoscaler_v2=0 ray start" in head) == (name == "local.yaml")
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--include-dashboard=false" in head


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_machines_with_gpus_and_says_that_it_was_never_run(name: str) -> None:
    text = (FOLDER / name).read_text()
    data = yaml.safe_load(text)
    assert data["head_node_type"] in data["available_node_types"]
    assert data["available_node_types"]["gpu"]["resources"]["GPU"] > 0
    assert "NEVER RUN" in text
    assert UpFile.read(FOLDER / name).head == ""


def test_down_finds_the_hosts_and_calls_ssh_as_ray_does() -> None:
    file = UpFile.read(FOLDER / "local.yaml")
    assert (file.head, file.workers) == ("10.0.0.11", ("10.0.0.12", "10.0.0.13"))
    command = " ".join(file.ssh)
    assert re.search(r"-i /\S+/\.ssh/id_ed25519 ", command)
    assert command.endswith("-l ubuntu")


@pytest.mark.parametrize("text", ["provider: 3", "cluster_name: x", "- a", "a: [", ""])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a file of `ray up`"):
        UpFile.read(path)
    with pytest.raises(ConfigError, match="cannot read"):
        UpFile.read(tmp_path / "none.yaml")
