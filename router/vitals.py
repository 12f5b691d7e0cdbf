"""What a process holds: where a leak would show."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Vitals:
    """Counts and bytes of one process. `tasks` are those of the event loop that asked, `answers` are under way."""

    tasks: int
    threads: int
    files: int
    resident_bytes: int
    answers: int = 0


def vitals_of(pid: int, tasks: int = 0, answers: int = 0) -> Vitals:
    """Of a process of this machine, by Linux' /proc. Raises OSError when there is none."""
    status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    counts = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE))
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Vitals(tasks, int(counts.get("Threads", 0)), files, int(counts.get("VmRSS", 0)) << 10, answers)


def own_vitals() -> Vitals:
    """Of this process; call it in the event loop whose tasks count."""
    return vitals_of(os.getpid(), len(asyncio.all_tasks()))
