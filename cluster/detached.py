"""`echelon serve --detach`: the server in a session of its own, and its words until it answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from workers.api.errors import EchelonError

POLL_SECONDS = 0.1


def log_path(note: Path) -> Path:
    """Where the server of `note` writes what it would have printed."""
    return note.with_suffix(".log")


def serve_detached(arguments: Sequence[str], note: Path, say: Callable[[str], None]) -> None:
    """Run `echelon serve` with `arguments` so that it outlives this process and its terminal; return once it answers.

    `note` is the file that it writes. Raises EchelonError with its last words when it ends before.
    """
    path = log_path(note)
    with path.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", "from cluster.cli import main; main()", "serve", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    said = 0
    while True:
        ended, up = server.poll(), answers(note, server.pid)  # looked at before its words, so that none is missed
        words = path.read_text(errors="replace")
        whole = words.rpartition("\n")[0]
        if len(whole) > said:
            say(whole[said:].strip("\n"))
            said = len(whole)
        if ended is not None:
            raise EchelonError(f"the server ended with {ended}: {words.strip()[-2000:]}")
        if up:
            say(f"it runs on as process {server.pid}; its log is {path}")
            return
        time.sleep(POLL_SECONDS)


def answers(note: Path, pid: int) -> bool:
    """Whether the note is of process `pid` and says where it answers."""
    try:
        said = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):  # not there yet, or half written
        return False
    return said.get("pid") == pid and "url" in said
