"""The command line without a cluster: help, errors in one line, what `stop` finds."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import doctor, serving
from workers.api.errors import ConfigError, EchelonError

ECHELON = str(Path(sys.executable).with_name("echelon"))


def echelon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ECHELON, *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_version_and_help() -> None:
    assert echelon("--version").stdout.strip() == f"echelon {importlib.metadata.version('echelon')}"
    text = echelon("--help").stdout
    assert all(command in text for command in ("serve", "stop", "doctor"))


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


def test_stop_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    with pytest.raises(EchelonError, match="nothing"):
        serving.stop_running(23333)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    serving.note_path(23333).write_text(json.dumps({"pid": gone.pid, "port": 23333}))
    assert "gone" in serving.stop_running(23333)
    assert not serving.note_path(23333).exists()


def test_a_foreign_kernels_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    assert doctor.foreign_kernels().ok
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9" if name == "kernels" else real(name))
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        doctor.refuse_if_unfit()
