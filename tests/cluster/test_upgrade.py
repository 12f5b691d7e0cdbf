"""What an upgrade takes from a file, what it refuses, and which version it makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import upgrade
from cluster.app import version_of
from cluster.config import ClusterConfig, EngineSection, HttpSection, ModelSection, resolve_model
from cluster.drain_command import Node, find_target
from cluster.engine_deployment import Rollout
from cluster.gateway_actor import Served
from cluster.upgrade import merged, refuse_other_front, upgraded
from router.dispatch.lease import ReplicaRow, ReplicaState
from router.dispatch.scaling import ScalingConfig
from workers.api.config import ReplicaConfig
from workers.api.errors import ConfigError, EchelonError
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
    refuse_other_front(RUNS, served_from(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_refused(copy: Path, name: str) -> None:
    with (copy / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match=f"{name} is not that of .* needs a new start"):
        refuse_other_front(RUNS, served_from(copy))


def test_another_context_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match="the context would be 128 tokens"):
        refuse_other_front(RUNS, served_from(copy, max_model_len=128))


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


TWO = ClusterConfig(models=(ModelSection(replicas=2), ModelSection(name="other", engine=EngineSection(max_num_seqs=3))))


def served(config: ClusterConfig) -> Served:
    versions = {one.model_name: version_of(one.replica_config("cpu"), None) for one in config.each}
    return Served(config, "secret", versions)


def changed_by(file: ClusterConfig, *, restart: bool = False) -> dict[str, Served]:
    """By model, what an upgrade of TWO to `file` would run then; without those that stay as they are."""
    wanted = merged(TWO, file)
    found = {
        one.model_name: upgraded(served(TWO), one, one.replica_config("cpu"), restart=restart) for one in wanted.each
    }
    return {name: then for name, then in found.items() if then is not None}


def test_of_several_models_only_the_changed_ones_are_replaced() -> None:
    assert changed_by(TWO) == {}
    assert set(changed_by(TWO, restart=True)) == {"demo", "other"}
    more = changed_by(TWO.with_model(ModelSection(name="other", replicas=4)))
    assert set(more) == {"other"}
    assert more["other"].versions["demo"] == served(TWO).versions["demo"]
    assert [one.model.replicas for one in more["other"].config.each] == [2, 4]
    (then,) = changed_by(TWO.model_copy(update={"engine": EngineSection(max_num_seqs=9)})).values()
    assert [one.engine.max_num_seqs for one in then.config.each] == [9, 3], "the other one has limits of its own"


def test_models_come_and_go_with_a_new_start_only() -> None:
    with pytest.raises(ConfigError, match="serves demo, other, the file says demo"):
        merged(TWO, RUNS)
    with pytest.raises(ConfigError, match="another QoS file"):
        refuse_other_front(TWO.of("other"), TWO.with_model(ModelSection(name="other", qos="/q.yaml")).of("other"))


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_does_not_come_up_is_asked_for_no_more(monkeypatch: pytest.MonkeyPatch, comes_back: bool) -> None:
    """The replicas that ran are asked for again, of the one model, and the reason is told even if they fail, too."""
    asked: list[tuple[str, list[str], int, bool]] = []

    def deploy(what: Served, ranks: dict[str, ReplicaConfig], *, start_first: bool) -> None:
        (limits,) = {config.engine.max_num_seqs for config in ranks.values()}
        asked.append((what.versions["other"], list(ranks), limits, start_first))

    def await_rollout(name: str, progress: Callable[[str], None]) -> None:
        progress(f"{name} is awaited")
        if len(asked) == 1 or not comes_back:
            raise EchelonError(f"no room for number {len(asked)}")

    monkeypatch.setattr(upgrade, "deploy", deploy)
    monkeypatch.setattr(upgrade, "await_rollout", await_rollout)
    monkeypatch.setattr(upgrade, "has_room", lambda ranks: False)
    runs = served(TWO)
    then = changed_by(TWO.with_model(ModelSection(name="other", engine=EngineSection(max_num_seqs=5))))["other"]
    said: list[str] = []
    with pytest.raises(EchelonError, match=r"upgrade of other was taken back.*no room for number 1"):
        upgrade.roll_out("other", then, runs, "cpu", said.append)
    assert asked == [(then.versions["other"], ["other"], 5, False), (runs.versions["other"], ["other"], 3, False)]
    assert said[-1] == "going back; other is awaited"
