"""What the edge makes of a configuration of Ray Serve, what it refuses, and how it says so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from haproxy_run import HAPROXY, TLS, Edge, new_edge, recorded, settings

from cluster.config import checked_config
from cluster.edge import BUFFER_BYTES, MARK, EdgeSettings, UnfitConfiguration, edited, refusal_of
from workers.api.errors import ConfigError

VALUES: dict[str, Any] = {
    "folder": "/tmp/e",
    "port": 4001,
    "stats_port": 4002,
    "metrics_port": 4003,
    "backend_port": 4004,
    "fallback_port": 4005,
}


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def make(name: str = "serving", **changes: Any) -> list[str]:
    return lines_of(edited(recorded(name, **VALUES), settings(**changes), Path("/tmp/e/tls.pem")))


@pytest.mark.parametrize("name", ["starting", "serving"])
def test_recorded_configurations_are_edited(name: str) -> None:
    lines = make(name, header_timeout=4.5, idle_timeout=61, keep_alive_timeout=62, max_connections=7)
    for wanted in (
        "timeout http-request 4500ms",
        "timeout client 61000ms",
        "timeout http-keep-alive 62000ms",
        "maxconn 7",
        "maxconn 107",
        "bind 127.0.0.1:4001 proto h1",
        "bind 127.0.0.1:4002",
        "bind 127.0.0.1:4003",
    ):
        assert lines.count(wanted) == 1, wanted
    assert sum(line.startswith("bind ") for line in lines) == 3
    assert not any("errorfile" in line or "3600s" in line or "mode 666" in line for line in lines)
    kept = lines_of(recorded(name, **VALUES))
    lost = [line for line in kept if line not in lines]
    assert len(lost) == 12, lost  # each of them is one that was to be replaced


def test_editing_twice_is_editing_once() -> None:
    once = edited(recorded("serving", **VALUES), settings(), Path("/x"))
    assert once.startswith(MARK)
    assert edited(once, settings(max_connections=5), Path("/x")) == once


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("127.0.0.1", "127.0.0.1:4001"),
        ("0.0.0.0", "0.0.0.0:4001"),
        ("*", "0.0.0.0:4001"),
        ("::1", "[::1]:4001"),
        ("::", "[::]:4001 v4v6"),
        ("front.example", "front.example:4001"),
    ],
)
def test_where_clients_are_listened_for(host: str, bound: str) -> None:
    assert f"bind {bound} proto h1" in make(host=host)


def test_tls_on_the_front_alone() -> None:
    bound = [line for line in make(tls_cert="c", tls_key="k") if line.startswith("bind ")]
    assert [" ssl " in line for line in bound] == [False, True, False]
    assert "crt /tmp/e/tls.pem" in bound[1]
    assert "ssl-min-ver TLSv1.2" in bound[1]


@pytest.mark.parametrize(
    ("was", "becomes", "named"),
    [
        ("frontend prometheus", "frontend measures", "frontend prometheus"),
        ("listen stats", "listen stats\n  bind :1", "bind"),
        ("listen stats", "listen more\n  bind :1\nlisten stats", "listen more"),
        ("listen stats", "frontend grpc_frontend\n    bind :9000 proto h2\nlisten stats", "grpc_frontend"),
        ("listen stats", "backend b\n    bind :9000\nlisten stats", "backend b"),
        ("listen stats", "global\nlisten stats", "twice"),
        ("    timeout client 3600s\n", "", "timeout client"),
        ("    timeout client 3600s\n", "    timeout client 3600s\n    timeout client 1s\n", "timeout client"),
        ("    timeout client 3600s\n", "    timeout client 3600s\n    timeout http-request 9s\n", "headers"),
        ("    maxconn 4096", "", "maxconn"),
        ("mode 666 level admin", "mode 777 level admin", "stats socket"),
        ("    errorfile 502", "    # errorfile 502", "errorfile"),
        ("    bind 127.0.0.1:4001", "    bind unix@/x", "bind"),
        ("global", "maxconn 1\nglobal", "maxconn 1"),
    ],
)
def test_what_does_not_look_as_expected_is_refused(was: str, becomes: str, named: str) -> None:
    text = recorded("serving", **VALUES)
    assert was in text
    with pytest.raises(UnfitConfiguration, match=named):
        edited(text.replace(was, becomes, 1), settings(), Path("/x"))


@pytest.mark.parametrize("host", ["1.2.3.4 ssl", "a\nlisten x", "[::1]"])
def test_an_address_is_an_address(host: str) -> None:
    with pytest.raises(UnfitConfiguration, match="no address"):
        make(host=host)


def test_settings_travel_by_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "edge.json"
    settings(tls_cert="a b").write(path)
    assert EdgeSettings.read(path) == settings(tls_cert="a b")
    assert path.stat().st_mode & 0o777 == 0o600
    assert settings().secret not in repr(settings())
    path.write_text('{"secret": "x"}')
    with pytest.raises(UnfitConfiguration, match=r"edge\.json"):
        EdgeSettings.read(path)


@pytest.fixture
def edge() -> Iterator[Edge]:
    edge = new_edge()
    yield edge
    edge.backend.shutdown()
    edge.backend.server_close()
    shutil.rmtree(edge.folder)


def refusal(edge: Edge, text: str, wanted: EdgeSettings) -> str:
    process = edge.run(text, wanted)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    why = refusal_of(edge.folder / "edge.json")
    assert why
    assert why in errors.decode()
    return why


def test_a_refusal_is_left_for_the_start_to_say(edge: Edge) -> None:
    assert refusal_of(edge.folder / "edge.json") is None
    assert "frontend prometheus" in refusal(edge, edge.text().replace("frontend prometheus", "frontend x"), settings())
    assert "HAProxy does not take it" in refusal(
        edge, edge.text().replace("balance leastconn", "balance x"), settings()
    )
    assert "no such" in refusal(edge, edge.text(), settings(tls_cert="/no", tls_key="/no")).lower()
    assert "ulimit" in refusal(edge, edge.text(), settings(max_connections=1 << 40))
    unlike = TLS / "expired-key.pem"
    assert "HAProxy does not take it" in refusal(
        edge, edge.text(), settings(tls_cert=str(TLS / "cert.pem"), tls_key=str(unlike))
    )


def test_other_arguments_go_to_haproxy(edge: Edge) -> None:
    run = subprocess.run(
        [str(Path(__file__).parents[2] / "cluster" / "haproxy.sh"), "-v"],
        env={"ECHELON_HAPROXY": HAPROXY, "ECHELON_EDGE": str(edge.folder / "edge.json"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "HAProxy version 2.8" in run.stdout


def test_a_cluster_file_says_what_the_edge_does() -> None:
    http = {"host": "0.0.0.0", "header_timeout": 1, "body_timeout": 2, "idle_timeout": 3, "keep_alive_timeout": 4}
    http |= {"max_connections": 5, "max_body_bytes": 6000, "tls_cert": "/c", "tls_key": "/k"}
    config = checked_config({"http": http}, "test")
    assert config.edge_settings("s") == EdgeSettings("s", "0.0.0.0", 6000, 5, 1, 2, 3, 4, "/c", "/k")
    patient = checked_config({"http": http | {"body_timeout": 600}}, "test")
    front = patient.front_config("s")
    assert patient.edge_settings("s").buffer_timeout == front.body_grace_seconds + BUFFER_BYTES / front.body_min_rate
    front = config.front_config("s")
    assert (front.max_body_bytes, front.body_seconds, front.stalled_seconds, front.edge_secret) == (6000, 2, 3, "s")
    for wrong in ({"tls_cert": "/c"}, {"tls_key": "/k"}, {"header_timeout": 0}, {"max_connections": 0}):
        with pytest.raises(ConfigError, match="http"):
            checked_config({"http": wrong}, "test")
