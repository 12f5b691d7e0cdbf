"""Cables and power of the hosts under a bench, asked for from inside one of them through a folder that both see.

The bench runs on the head host and cannot reach its own switch. `Cables` is its side; `serve_cables` is the side of
whoever made the hosts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ANSWER_SECONDS = 180.0  # a host that boots again has to join, too
LOOK_SECONDS = 0.005


class Cables:
    """Asks; each call returns once it is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def ask(self, act: str, host: str) -> float:
        """`act` is cut, heal, kill or start. The moment when it was done, by this machine's monotonic clock."""
        self._number += 1
        name = f"{self._number:06d}"
        (self._folder / f"{name}.new").write_text(json.dumps([act, host]))
        (self._folder / f"{name}.new").rename(self._folder / f"{name}.ask")
        answer = self._folder / f"{name}.done"
        deadline = time.monotonic() + ANSWER_SECONDS
        while not answer.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody has done: {act} {host}")
            time.sleep(LOOK_SECONDS)
        return float(answer.read_text())


def serve_cables(folder: Path, acts: Mapping[str, Callable[[str], None]], running: Callable[[], bool]) -> None:
    """Do what is asked for while `running`. Hosts share this machine's monotonic clock."""
    while running():
        for asked in sorted(folder.glob("*.ask")):
            act, host = json.loads(asked.read_text())
            asked.unlink()
            acts[act](host)
            done = asked.with_suffix(".new")
            done.write_text(str(time.monotonic()))
            done.rename(asked.with_suffix(".done"))
        time.sleep(LOOK_SECONDS)
