"""Takes the hosts of pretend.py down when the process that made them ends: the end of stdin says so."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

WAIT_SECONDS = 20.0


def has_link(name: str) -> bool:
    """Whether this machine has a network interface called `name`."""
    return Path("/sys/class/net", name).exists()


def sweep(folder: Path, bridge: str, *, keep_folder: bool = False) -> None:
    """End every host whose files lie in `folder`; remove their links, the bridge and the files. Raises TimeoutError."""
    names = [path.suffix.removeprefix(".") for path in folder.glob("init.*")]
    for name in names:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int((folder / f"pid.{name}").read_text())
            if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():  # the number may be another's now
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_SECONDS
    while _inhabited(folder):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of {folder} are still there")
        time.sleep(0.02)
    for link in (*names, bridge):
        while has_link(link):  # the kernel takes a dead host's link away by itself, some time later
            subprocess.run(["ip", "link", "del", link], stderr=subprocess.DEVNULL, check=False)
    if not keep_folder:
        shutil.rmtree(folder)
        return
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _inhabited(folder: Path) -> bool:
    """Whether some process has mounts of these hosts."""
    needle = f"{folder}/".encode()
    for table in Path("/proc").glob("[0-9]*/mounts"):
        with contextlib.suppress(OSError):
            if needle in table.read_bytes():
                return True
    return False


if __name__ == "__main__":
    sys.stdin.buffer.read()
    sweep(Path(sys.argv[1]), sys.argv[2])
