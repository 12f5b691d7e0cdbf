"""What checks share: a pipeline in this process, one over two ranks, and a server that a command started."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any

import echelon
from cluster.environment import free_port, fresh_environment

MAIN = "from cluster.cli import main; main()"
NAME = "internlm-chat-7b"  # the name that documents ask for
START_SECONDS = 300.0
TIERS = {
    "Platinum": {"user_id0": 100, "default": 0},
    "Gold": {"user_id1": 50, "user_id2": 50},
    "Silver": {"user_id3": 5, "default": 95},
    "Bronze": {"user_id4": 30, "user_id5": 30, "user_id6": 40, "default": 0},
}


class Site:
    """Made as it is asked for; `close` ends all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()

    @cached_property
    def pipe(self) -> echelon.Pipeline:
        """The demo model in this process."""
        return self._stack.enter_context(echelon.pipeline("demo"))

    @cached_property
    def pipe_of_two(self) -> echelon.Pipeline:
        """The demo model over two ranks."""
        config = echelon.TurbomindEngineConfig(tp=2)
        return self._stack.enter_context(echelon.pipeline("demo", backend_config=config))

    def close_pipe_of_two(self) -> None:
        """It takes the room that a server needs."""
        if "pipe_of_two" in self.__dict__:
            self.pipe_of_two.close()

    @cached_property
    def qos_file(self) -> Path:
        """Tiers, users and quotas as LMDeploy-QoS has them."""
        groups = {
            tier: [{"id": user, "quota_pct": share} for user, share in users.items()] for tier, users in TIERS.items()
        }
        file = self.folder / "tiers.json"
        file.write_text(json.dumps({"enable_user_qos": True, "user_groups": list(TIERS), "user_group_map": groups}))
        return file

    @cached_property
    def conversations(self) -> Path:
        """A data set in ShareGPT's form."""
        turns = [("human", "What is 3 + 4?"), ("gpt", "3 + 4 = 7."), ("human", "Hi!"), ("gpt", "Hello! How are you?")]
        said = [{"from": who, "value": text} for who, text in turns]
        file = self.folder / "conversations.json"
        file.write_text(json.dumps([{"id": str(i), "conversations": said} for i in range(4)]))
        return file

    @cached_property
    def url(self) -> str:
        """Of a server that `serve api_server` started, with tiers."""
        self.close_pipe_of_two()
        port = free_port()
        options = ["--server-port", str(port), "--model-name", NAME, "--qos-config-path", str(self.qos_file)]
        server = self.start("serve", "api_server", "demo", "--server-name", "127.0.0.1", *options)
        url = f"http://127.0.0.1:{port}"
        self.await_said("Echelon is serving", server)  # its proxy may be reloading until then
        return url

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on; it ends with the site."""
        log = (self.folder / f"{'-'.join(arguments[:2])}-{time.monotonic_ns()}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments], stdout=log, stderr=subprocess.STDOUT, text=True,
            env=fresh_environment() | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        process.log = Path(log.name)  # type: ignore[attr-defined]

        def stop() -> None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
            log.close()

        self._stack.callback(stop)
        return process

    def run(self, *arguments: str, said: str = "", seconds: float = 300.0) -> str:
        """What a command prints, which must succeed."""
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *arguments], input=said, capture_output=True, text=True, timeout=seconds,
            check=False, env=fresh_environment() | {"COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        return done.stdout

    def await_said(self, text: str, process: subprocess.Popen[str]) -> None:
        """Return once the command has printed `text`."""
        log: Path = process.log  # type: ignore[attr-defined]
        deadline = time.monotonic() + START_SECONDS
        while text not in (said := log.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"never said {text!r}: {said[-3000:]}")
            time.sleep(0.3)

    def await_url(self, url: str, process: subprocess.Popen[str]) -> None:
        """Return once a GET of `url` is answered."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(url, timeout=10):
                    return
            except OSError as e:
                log: Path = process.log  # type: ignore[attr-defined]
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{url}: {e}; {log.read_text()[-3000:]}") from e
                time.sleep(0.3)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON of one POST, which must succeed."""
        request = urllib.request.Request(
            self.url + route, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{route}: {e.code} {e.read().decode()[:500]}") from e
        return found

    def get(self, url: str) -> bytes:
        """The body of one GET, which must succeed."""
        with urllib.request.urlopen(url, timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def close(self) -> None:
        """Nothing that was started runs."""
        self._stack.close()
