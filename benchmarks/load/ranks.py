"""Several processes that need each other: when one fails, the rest would wait for it without end."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence


def run_together(commands: Sequence[Sequence[str]]) -> list[int]:
    """Run all at once; returns their exit codes. When one fails, the others are killed."""
    running = [subprocess.Popen(command) for command in commands]
    try:
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            time.sleep(0.1)
    finally:
        for one in running:
            one.kill()
    return [one.wait() for one in running]
