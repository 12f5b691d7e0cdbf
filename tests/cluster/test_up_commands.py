"""`echelon node`, `echelon down` and the wait of `echelon serve --detach`, without hosts and without Ray."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from cluster.access import node_edge_secret
from cluster.detached import answers
from cluster.down import take_down
from cluster.edge import EdgeSettings
from cluster.node_command import node_exports
from router.keys.edit import add_key
from router.keys.ring import make_key
from workers.api.errors import ConfigError, EchelonError

SSH = """#!/bin/sh
for word in "$@"; do last=$word; before=$host; host=$one; one=$word; done
echo "$host|$last" >> {log}
echo "said on $host"
test "$host" != "{bad}"
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file with its keys on a host whose Ray has a token."""
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of this test")
    for name in ("RAY_AUTH_MODE", "ECHELON_EDGE", "RAY_SERVE_HAPROXY_STATS_PORT"):
        monkeypatch.delenv(name, raising=False)
    add_key(tmp_path / "keys.yaml", make_key(), "me")
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"http": {"host": "0.0.0.0", "api_keys": "keys.yaml", "max_body_bytes": 4096}}))
    return file


def test_node_prints_what_ray_needs_and_leaves_the_edge_its_settings(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "9999")  # the user's own, which stays
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # this one does not
    lines = node_exports(host).splitlines()
    assert all(line.startswith("export ") for line in lines)
    exports = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    assert exports["RAY_AUTH_MODE"] == "token"
    assert exports["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert "RAY_SERVE_HAPROXY_STATS_PORT" not in exports
    edge = Path(exports["ECHELON_EDGE"])
    assert stat.S_IMODE(edge.stat().st_mode) == 0o600
    assert stat.S_IMODE(edge.parent.stat().st_mode) == 0o700
    settings = EdgeSettings.read(edge)
    assert (settings.secret, settings.max_body_bytes) == (node_edge_secret("of this test"), 4096)
    assert "of this test" not in "".join(lines) + edge.read_text()


def test_node_refuses_a_host_without_token_or_keys(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="ray get-auth-token --generate"):
        node_exports(host)
    (tmp_path / "none").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        node_exports(host)
    (tmp_path / "keys.yaml").unlink()
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        node_exports(host)


def up_file(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: str = "") -> Path:
    """A file of `ray up`, an ssh that only writes down what it is called for, and Ray's notes of the cluster."""
    (folder / "bin").mkdir()
    ssh = folder / "bin/ssh"
    ssh.write_text(SSH.format(log=folder / "called", bad=bad))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    (folder / "ray").mkdir()
    for name in ("cluster-mine.state", "cluster-mine.lock", "cluster-other.state"):
        (folder / "ray" / name).touch()
    file = folder / "up.yaml"
    provider = {"type": "local", "head_ip": "h0", "worker_ips": ["h1", "h2"]}
    file.write_text(yaml.safe_dump({"cluster_name": "mine", "provider": provider, "auth": {"ssh_user": "me"}}))
    return file


def test_down_stops_echelon_then_ray_on_the_head_and_then_on_every_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    take_down(up_file(tmp_path, monkeypatch), said.append)
    calls = [line.split("|", 1) for line in (tmp_path / "called").read_text().splitlines()]
    assert [at for at, _ in calls[:2]] == ["h0", "h0"]
    assert sorted(at for at, _ in calls[2:]) == ["h1", "h2"]
    assert "echelon stop --all" in calls[0][1]
    assert all("ray stop --force" in what and "ray_bootstrap_key.pem" in what for _, what in calls[1:])
    assert said[-1] == "mine is down"
    assert "h2: said on h2" in said
    assert [p.name for p in (tmp_path / "ray").iterdir()] == ["cluster-other.state"]


def test_down_goes_on_past_a_host_that_fails_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EchelonError, match=r"^h1: said on h1$"):
        take_down(up_file(tmp_path, monkeypatch, bad="h1"), lambda line: None)
    assert "h2|" in (tmp_path / "called").read_text()


def test_a_server_answers_once_its_own_note_says_where(tmp_path: Path) -> None:
    note = tmp_path / "serve-1.json"
    assert not answers(note, 7)
    note.write_text('{"pid": 7')
    assert not answers(note, 7)
    note.write_text(json.dumps({"pid": 7, "began": 1}))
    assert not answers(note, 7)
    note.write_text(json.dumps({"pid": 7, "url": "http://here"}))
    assert answers(note, 7)
    assert not answers(note, 8)
