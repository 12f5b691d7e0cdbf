"""What an upgrade takes from a file, what it refuses, and which version it makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.app import version_of
from cluster.config import ClusterConfig, EngineSection, HttpSection, ModelSection, resolve_model
from cluster.drain_command import Node, find_target
from cluster.engine_deployment import Rollout
from cluster.upgrade import merged, refuse_other_text
from router.dispatch.lease import ReplicaRow, ReplicaState
from router.dispatch.scaling import ScalingConfig
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport, ReplicaInfo

RUNS = ClusterConfig(model=ModelSection(replicas=2), http=HttpSection(port=1234))


def test_model_and_engine_are_taken_and_the_rest_stays() -> None:
    file = ClusterConfig(
        model=ModelSection(replicas=3), engine=EngineSection(max_num_seqs=7), http=HttpSection(port=4321)
    )
    wanted = merged(RUNS, file)
    assert (wanted.model.replicas, wanted.engine.max_num_seqs, wanted.http.port) == (3, 7, 1234)


def test_another_name_is_another_model() -> None:
    with pytest.raises(ConfigError, match="serves demo, the file says other"):
        merged(RUNS, ClusterConfig(model=ModelSection(name="other")))


def test_the_version_follows_what_the_ranks_are_told() -> None:
    def version(config: ClusterConfig) -> str:
        return version_of(config.replica_config("cpu"), config.model.revision)

    assert version(RUNS) == version(RUNS.model_copy())
    more = RUNS.model_copy(update={"model": ModelSection(replicas=5, drain_timeout=1.0)})
    assert version(more) == version(RUNS)  # replicas of both may stand beside each other
    other = RUNS.model_copy(update={"engine": EngineSection(max_num_seqs=7)})
    assert version(other) != version(RUNS)
    assert version(RUNS.model_copy(update={"model": ModelSection(revision="a")})) != version(RUNS)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_model("demo"), tmp_path / "demo"))


def served_from(folder: Path, **fields: object) -> ClusterConfig:
    return RUNS.model_copy(update={"model": ModelSection(path=str(folder), **fields)})  # type: ignore[arg-type]


def test_another_checkpoint_with_the_same_text_is_taken(copy: Path) -> None:
    refuse_other_text(RUNS, served_from(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_refused(copy: Path, name: str) -> None:
    with (copy / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match=f"{name} is not that of .* needs a new start"):
        refuse_other_text(RUNS, served_from(copy))


def test_another_context_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match="the context would be 128 tokens"):
        refuse_other_text(RUNS, served_from(copy, max_model_len=128))


def test_one_replica_more_is_one_whatever_their_number() -> None:
    for replicas in range(1, 101):
        percent = Rollout(start_first=True).surge_percent(replicas)
        assert (percent * replicas + 99) // 100 == 1, replicas  # Serve's sum
    assert Rollout(start_first=False).surge_percent(3) == 0
    scaled = Rollout(start_first=True, scaling=ScalingConfig(1, 8))
    assert all((scaled.surge_percent(n) * n + 99) // 100 == 1 for n in range(1, 9))


def row(replica_id: str, node: str) -> ReplicaRow:
    info = ReplicaInfo(replica_id, "m", "host", 1, 4096, 8, num_blocks=64, block_size=16, node=node)
    return ReplicaRow(info, ReplicaState.READY, LoadReport(0), 0, 0, 1.0, 1.0, 0.0, 0.0)


def test_what_is_drained_is_found_by_any_of_its_names() -> None:
    rows = [row("abc1", "f00d11"), row("abd2", "f00d22")]
    nodes = [Node("f00d11", "10.0.0.1", "first", True), Node("f00d22", "10.0.0.2", "second", False)]
    assert find_target("abc", rows, nodes) is rows[0]
    for name in ("f00d2", "10.0.0.2", "second"):
        assert find_target(name, rows, nodes) is nodes[1]
    for name, why in (("ab", "several are"), ("f00d", "several are"), ("third", "nothing is"), ("", "several are")):
        with pytest.raises(
            ConfigError, match=f"{why} called '{name}' here; there are: replica abc1 of m on node f00d11"
        ):
            find_target(name, rows, nodes)
