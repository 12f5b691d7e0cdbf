"""`echelon stop` signals the process that the note names, and no other that has its number now."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import serving
from workers.api.errors import EchelonError

PORT = 24001
# Removes its note and ends when it is told to, as `echelon serve` does; or just dies.
SERVER = """
import pathlib, signal, sys
note = pathlib.Path(sys.argv[1])
def end(*_):
    if sys.argv[2] == "orderly":
        note.unlink()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    return serving.note_path(PORT)


def note(path: Path, pid: int, began: int | None) -> None:
    path.write_text(json.dumps({"pid": pid, "began": began, "port": PORT}))


@pytest.mark.parametrize(("manner", "said"), [("orderly", "stopped the server"), ("dies", "without cleaning up")])
def test_the_server_is_stopped(state: Path, manner: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER, str(state), manner], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        note(state, server.pid, serving._began(server.pid))
        looked = serving._began

        def began(pid: int) -> int | None:
            server.poll()  # a child that ended stays in the table until its parent looks
            return looked(pid)

        monkeypatch.setattr(serving, "_began", began)
        assert said in serving.stop_running(PORT)
    assert not state.exists()


def test_a_number_that_another_process_has_now_is_left_alone(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        pytest.fail(f"signal {signal.Signals(number).name} went to a stranger")

    monkeypatch.setattr(os, "kill", kill)
    began = serving._began(os.getpid())
    assert began is not None
    note(state, os.getpid(), began - 1)
    assert "gone already" in serving.stop_running(PORT)
    assert not state.exists()


def test_a_server_that_is_gone_leaves_only_its_note(state: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        began = serving._began(gone.pid)
    note(state, gone.pid, began)
    assert "gone already" in serving.stop_running(PORT)
    assert not state.exists()


def test_no_note_and_a_broken_note_are_said(state: Path) -> None:
    with pytest.raises(EchelonError, match="nothing that this user started"):
        serving.stop_running(PORT)
    state.write_text("{")
    with pytest.raises(EchelonError, match="remove it"):
        serving.stop_running(PORT)


def test_upgrade_and_drain_find_the_ray_of_what_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    said = {"pid": os.getpid(), "began": serving._began(os.getpid()), "port": 4321}
    for note in (None, said, {**said, "began": 1, "ray": "10.0.0.1:6379"}):  # nobody, still starting, gone
        if note is not None:
            serving.note_path(4321).write_text(json.dumps(note))
        with pytest.raises(EchelonError, match="serves on port 4321, or it is still starting"):
            serving.ray_address(4321)
    serving.note_path(4321).write_text(json.dumps({**said, "ray": "10.0.0.1:6379"}))
    assert serving.ray_address(4321) == "10.0.0.1:6379"
