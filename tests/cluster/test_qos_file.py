"""The QoS file: from the cluster file or a flag, checked at the start, watched while the cluster runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.qos_file import QosFile
from cluster.serving import cluster_config
from workers.api.errors import ConfigError

GOOD = "user_groups: [Gold, Bronze]\nuser_group_map: {Gold: [{id: anna, quota_pct: 100}]}\n"


def test_it_lies_beside_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "qos.yaml").write_text(GOOD)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("dispatch: {qos: qos.yaml}")
    config = cluster_config(str(cluster), {})
    assert config.dispatch.qos == str(tmp_path / "qos.yaml")
    qos = config.dispatcher_config().qos
    assert qos is not None
    assert qos.account("anna").tier.name == "Gold"
    assert cluster_config("demo", {"qos": str(tmp_path / "qos.yaml")}).dispatcher_config().qos is not None
    assert cluster_config("demo", {}).dispatcher_config().qos is None


def test_a_bad_one_ends_the_start_with_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "qos.yaml"
    bad.write_text(GOOD + "tiers:\n  Golden: {}\n")
    with pytest.raises(ConfigError, match=r"qos.yaml:4: 'Golden' is not one of user_groups"):
        cluster_config("demo", {"qos": str(bad)})


def test_a_change_is_taken_and_a_bad_one_refused_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "qos.yaml"
    path.write_text(GOOD)
    file = QosFile(path)
    assert file.look() is not None
    while file.look() is not None:
        pass
    assert file.look() is None
    path.write_text(GOOD + "tiers: {Bronze: {max_wait: -1}}\n")
    os.utime(path, ns=(1, 1))
    assert [file.look(), file.look(), file.look()] == [None] * 3
    assert caplog.text.count("qos.yaml:3: tiers.Bronze.max_wait") == 1
    path.unlink()
    assert [file.look(), file.look(), file.look()] == [None] * 3
    assert caplog.text.count("cannot read") == 1
    path.write_text(GOOD.replace("anna", "bert"))
    found = file.look()
    assert found is not None
    assert found.account("bert").tier.name == "Gold"


async def test_the_server_takes_it() -> None:
    from router.dispatch.dispatcher import DispatcherConfig
    from router.dispatch.server import DispatcherServer
    from router.qos.file import make_qos_config
    from router.qos.source import parse_source

    server = DispatcherServer(DispatcherConfig(), secret="s")
    await server.start()
    server.reload(make_qos_config(parse_source(GOOD, "f", as_json=False)))
    assert server.dispatcher.qos is not None
    await server.close()
    await asyncio.sleep(0)


def test_the_command_explains() -> None:
    file = Path(__file__).resolve().parents[2] / "configs" / "qos" / "floors.yaml"
    result = CliRunner().invoke(app, ["qos", "check", str(file)])
    assert result.exit_code == 0
    assert "alice: 75.0%" in result.output
    assert "Bronze: after Gold; at least 2.0% of all service while it waits" in result.output
