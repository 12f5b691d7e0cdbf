"""The private folder of a process: gone when it ends, and what a killed one has left goes with the next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = "import sys; from pathlib import Path; from cluster.environment import private_folder; "
MAKE += "print(private_folder(Path(sys.argv[1])), flush=True); sys.stdin.read()"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    (tmp_path / "echelon-not-ours").mkdir()
    (tmp_path / "echelon-a-file").write_text("")
    return tmp_path


class Owner:
    """A process with a private folder in `parent`, until it is ended."""

    def __init__(self, parent: Path) -> None:
        command = [sys.executable, "-c", MAKE, str(parent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def end(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        self.process.communicate()


def test_a_killed_process_leaves_its_folder_to_the_next(parent: Path) -> None:
    killed, alive = Owner(parent), Owner(parent)
    killed.end(kill=True)
    assert (killed.folder / "owner.lock").exists()
    third = Owner(parent)
    assert not killed.folder.exists()
    assert alive.folder.is_dir()
    assert third.folder.is_dir()
    for owner in (alive, third):
        owner.end(kill=False)
    assert sorted(p.name for p in parent.iterdir()) == ["echelon-a-file", "echelon-not-ours"]
