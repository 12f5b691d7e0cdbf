"""The command line without a cluster: help, errors in one line, what `stop` finds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.rich_utils
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from cluster import cli, doctor, environment, serving
from cluster.help_table import show_whole_flags
from router.keys.edit import add_key
from router.keys.ring import make_key
from workers.api.errors import ConfigError, EchelonError

ECHELON = str(Path(sys.executable).with_name("echelon"))


def echelon(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environ}
    return subprocess.run([ECHELON, *arguments], capture_output=True, text=True, check=False, timeout=120, env=environ)


def test_version_and_help() -> None:
    assert echelon("--version").stdout.strip() == f"echelon {importlib.metadata.version('echelon')}"
    text = echelon("--help").stdout
    assert all(command in text for command in ("serve", "stop", "doctor"))


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def test_flags_stand_whole_in_the_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "Table", typer.rich_utils.Table)  # as it was, afterwards
    show_whole_flags()
    seen = 0
    for path, command in commands(get_command(cli.app)):
        text = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
        assert max(map(len, text.splitlines())) <= 80
        for option in command.params:
            flags = () if option.hidden else (*option.opts, *option.secondary_opts)
            for flag in (f for f in flags if f.startswith("--")):
                assert re.search(rf"{re.escape(flag)}(?![\w-])", text), (path, flag)
                seen += 1
    assert seen > 100


def test_help_is_asked_for_on_the_command_line() -> None:
    assert "--cache-max-entry-count" in echelon("chat", "-h", COLUMNS="80").stdout


def test_an_error_is_one_readable_line() -> None:
    result = echelon("serve", "./no-such-folder", "--port", "23999")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "no-such-folder" in result.stderr


def test_a_taken_port_says_what_to_do() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=f"echelon stop --port {port}"):
            serving.refuse_taken_port("127.0.0.1", port)


def test_batch_invariant_is_an_option_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(serving, "run_until_stopped", lambda _model, flags, address: given.append(flags))
    for arguments in (["serve", "demo"], ["serve", "demo", "--batch-invariant"]):
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    engines = [serving.cluster_config("demo", flags).replica_config("cuda").engine for flags in given]
    assert [engine.batch_invariant for engine in engines] == [False, True]


def test_serve_needs_no_command_and_forgives_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(serving, "run_until_stopped", lambda model, flags, address: seen.append((model, flags)))
    for arguments in ([], ["demo", "--session_len", "64"], ["--session-len", "64", "demo"], ["model", "demo"]):
        assert CliRunner().invoke(cli.app, ["serve", *arguments]).exit_code == 0
    assert seen == [("demo", {}), ("demo", {"max_model_len": 64}), ("demo", {"max_model_len": 64}), ("demo", {})]
    wrong = CliRunner().invoke(cli.app, ["serve", "demo", "--prot", "1"])
    assert wrong.exit_code == 2
    assert "--port" in wrong.output
    text = CliRunner().invoke(cli.app, ["serve", "-h"]).output
    assert "--session-len" in text
    assert "serve model" in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gpu-host"])
def test_without_keys_only_loopback_is_served(host: str) -> None:
    with pytest.raises(ConfigError, match="--no-auth"):
        serving.refuse_open_house(serving.cluster_config("demo", {"host": host}))
    serving.refuse_open_house(serving.cluster_config("demo", {"host": host, "no_auth": True}), joins=True)
    for near in ("127.0.0.1", "::1", "localhost"):
        config = serving.cluster_config("demo", {"host": near})
        serving.refuse_open_house(config)
        with pytest.raises(ConfigError, match="proxies of a Ray cluster"):  # which may listen elsewhere
            serving.refuse_open_house(config, joins=True)


def test_with_keys_every_address_is_served(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    flags = {"host": "0.0.0.0", "api_keys": str(keys)}
    with pytest.raises(ConfigError, match="No such file"):
        serving.refuse_open_house(serving.cluster_config("demo", flags))
    keys.write_text("keys:\n- owner: anna\n")
    keys.chmod(0o600)
    with pytest.raises(ConfigError, match="line 2"):
        serving.refuse_open_house(serving.cluster_config("demo", flags))
    add_key(keys.with_name("good.yaml"), make_key(), "anna")
    flags["api_keys"] = str(keys.with_name("good.yaml"))
    assert "1 API keys" in serving.refuse_open_house(serving.cluster_config("demo", flags))
    with pytest.raises(ConfigError, match="exclude each other"):
        serving.cluster_config("demo", {**flags, "no_auth": True})


def test_who_may_ask_is_said() -> None:
    assert "only programs on this machine" in serving.refuse_open_house(serving.cluster_config("demo", {}))
    open_house = serving.cluster_config("demo", {"host": "0.0.0.0", "no_auth": True})
    assert "whoever reaches 0.0.0.0" in serving.refuse_open_house(open_house)


def test_brackets_in_an_error_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise EchelonError("no model for [/b] [demo]")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "errors", Console(stderr=True, highlight=False))
    with pytest.raises(SystemExit):
        cli.main()
    assert "no model for [/b] [demo]" in capsys.readouterr().err


def test_two_on_one_machine_share_no_port() -> None:
    assert len(set(environment.free_ports(20))) == 20
    show = (
        "import os; from cluster.environment import prepare_ray; prepare_ray();"
        "print(*(v for k, v in os.environ.items() if k.startswith('RAY_SERVE') and k.endswith('_PORT')))"
    )
    ports = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(ports)) == 4
    assert not set(ports) & {"8404", "9101", "8500", "9500"}


def test_a_server_that_is_started_from_a_cluster_has_ports_of_its_own() -> None:
    code = (
        "import os; before = dict(os.environ); from cluster.environment import fresh_environment, prepare_ray;"
        "prepare_ray(); assert os.environ != before; assert fresh_environment() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_foreign_kernels_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    assert doctor.foreign_kernels().ok
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9" if name == "kernels" else real(name))
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        doctor.refuse_if_unfit()


def test_commands_do_not_wait_for_the_packages_of_a_server() -> None:
    heavy = ("ray", "torch", "transformers", "fastapi", "pydantic", "router.dispatch")
    code = f"import sys, cluster.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
