"""`echelon serve` as a user runs it: its own process, its own Ray, a model from outside of the tree, keys, TLS, the
lines it prints, and its end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.environment import free_port
from router.keys.edit import add_key, revoke_key
from router.keys.ring import make_key

pytestmark = pytest.mark.ray

DEMO = Path(__file__).parents[2] / "configs" / "demo-model"
MODEL_FILE = """
from workers.models.llama import LlamaForCausalLM
from workers.models.registry import register


class MineForCausalLM(LlamaForCausalLM):
    pass


register("MineForCausalLM", MineForCausalLM)
"""
TLS = Path(__file__).parents[1] / "cluster" / "tls"
ECHELON = str(Path(sys.executable).with_name("echelon"))


def test_serve_answers_prints_and_stops(tmp_path: Path) -> None:
    """The demo's weights under an architecture that only --model-file knows: every rank must have read that file."""
    port = free_port()
    shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["MineForCausalLM"]}))
    (tmp_path / "mine.py").write_text(MODEL_FILE)
    # As from a fresh shell: the other cluster of this process has set Ray's variables for itself.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ECHELON_"))}
    env["ECHELON_STATE_DIR"] = str(tmp_path)
    keys, key = tmp_path / "keys.yaml", make_key()
    entry = add_key(keys, key, "anna")
    for name in ("cert.pem", "key.pem"):
        shutil.copy(TLS / name, tmp_path)
    flags = [
        "--model-file",
        "mine.py",
        "--name",
        "mine",
        "--api-keys",
        "keys.yaml",
        "--tls-cert",
        "cert.pem",
        "--tls-key",
        "key.pem",
    ]
    server = subprocess.Popen(
        [ECHELON, "serve", "./model", "--port", str(port), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        cwd=tmp_path,
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
        assert f"Echelon is serving https://127.0.0.1:{port}/v1 (model mine)" in text
        curl = re.search(r"^\s*(curl .*)$", text, re.MULTILINE)
        assert curl

        def ask(shown: str | None) -> dict[str, Any]:
            with_key = {**env, "ECHELON_API_KEY": shown or ""}
            done = subprocess.run(["sh", "-c", curl[1]], capture_output=True, check=True, timeout=60, env=with_key)
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer

        assert "7" in ask(key)["choices"][0]["message"]["content"]
        assert "asks for an API key" in ask(None)["error"]["message"]
        assert ask(make_key())["error"]["code"] == "invalid_api_key"
        revoke_key(keys, entry.id)
        while "error" not in (answer := ask(key)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "revoked" in answer["error"]["message"]
        assert key not in text
        plain = subprocess.run(["curl", "-sS", f"http://127.0.0.1:{port}/v1/models"], check=False, timeout=60)
        assert plain.returncode != 0
        stopped = subprocess.run(
            [ECHELON, "stop", "--port", str(port)], env=env, capture_output=True, text=True, check=True, timeout=60
        )
        assert "stopped" in stopped.stdout
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
