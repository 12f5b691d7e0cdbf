"""`echelon serve` as a user runs it: its own process, its own Ray, the line, the curl line, and the end of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.environment import free_port

pytestmark = pytest.mark.ray

ECHELON = str(Path(sys.executable).with_name("echelon"))


def test_serve_answers_prints_and_stops(tmp_path: Path) -> None:
    port = free_port()
    # As from a fresh shell: the other cluster of this process has set Ray's variables for itself.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ECHELON_"))}
    env["ECHELON_STATE_DIR"] = str(tmp_path)
    server = subprocess.Popen(
        [ECHELON, "serve", "demo", "--port", str(port), "--name", "mine"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        assert server.stdout is not None
        lines: list[str] = []
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any("stop it with" in line for line in lines):
            line = server.stdout.readline()
            assert line, "".join(lines)
            lines.append(line)
        text = "".join(lines)
        assert f"Echelon is serving http://127.0.0.1:{port}/v1 (model mine)" in text
        curl = re.search(r"^\s*(curl .*)$", text, re.MULTILINE)
        assert curl
        answer = subprocess.run(shlex.split(curl[1]), capture_output=True, check=True, timeout=60).stdout
        assert "7" in json.loads(answer)["choices"][0]["message"]["content"]
        stopped = subprocess.run(
            [ECHELON, "stop", "--port", str(port)], env=env, capture_output=True, text=True, check=True, timeout=60
        )
        assert "stopped" in stopped.stdout
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
