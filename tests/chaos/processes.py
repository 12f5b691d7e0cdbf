"""The processes of a cluster of one machine, by what they are: found below our own, orphans included."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from router.vitals import Vitals, vitals_of

ROOT = 0  # whose processes are looked at; 0: our own
PR_SET_CHILD_SUBREAPER = 36
ROLES = (  # by what the command line begins with or contains; the first that fits
    ("rank", "ray::RankActor"),
    ("dispatcher", "ray::DispatcherActor"),
    ("gateway", "ray::Gateway"),
    ("supervisor", "ray::ServeReplica:replicas-"),
    ("ingress", "ray::ServeReplica:front:"),
    ("plain engine", "ray::ServeReplica:plain:FakeEngine"),
    ("plain front", "ray::ServeReplica:plain:"),
    ("controller", "ray::ServeController"),
    ("proxy actor", "ray::HAProxyManager"),
    ("proxy actor", "ray::ProxyActor"),
    ("haproxy", "/bin/haproxy"),
    ("gcs", "gcs_server"),
    ("raylet", "/raylet"),
    ("spare worker", "ray::IDLE"),
    ("agent", "ray/dashboard"),
    ("agent", "runtime_env/agent"),
)
_STAT = re.compile(r"^(\d+) \((.*)\) (\S) (\d+) ", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Process:
    """One of them."""

    pid: int
    parent: int
    role: str


def adopt_orphans() -> None:
    """From now on a process below us whose parent dies becomes our child, not that of process 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def role_of(command: str) -> str:
    """What a process with this command line is; "other" where it is nothing of a cluster's."""
    return next((role for role, mark in ROLES if mark in command), "other")


def below(root: int) -> list[Process]:
    """All live processes below `root`, without zombies."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found = _STAT.match(path.read_text("utf-8", "replace"))
            command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if found is not None and found[3] != "Z":
            parents[int(found[1])] = int(found[4]), command
    out: list[Process] = []
    for pid, (parent, command) in parents.items():
        above = parent
        while above in parents and above != root:
            above = parents[above][0]
        if above == root:
            out.append(Process(pid, parent, role_of(command)))
    return out


def cluster_processes() -> list[Process]:
    """Those below this process, or below ROOT."""
    return [p for p in below(ROOT or os.getpid()) if p.pid != os.getpid()]


def pids(role: str) -> list[int]:
    """Process ids of all that are `role`."""
    return sorted(p.pid for p in cluster_processes() if p.role == role)


def is_gone(pid: int) -> bool:
    """Whether process `pid` has ended: whatever it had open is closed."""
    try:
        found = _STAT.match(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace"))
    except OSError:
        return True
    return found is not None and found[3] == "Z"


def census() -> Counter[str]:
    """How many there are of each role that has a fixed number; what Ray keeps in reserve is not counted."""
    return Counter(p.role for p in cluster_processes() if p.role not in ("spare worker", "agent", "other"))


def holdings() -> dict[str, Vitals]:
    """By role, the most that one of its processes holds: a new process stands where another one died."""
    most: dict[str, Vitals] = {}
    for process in cluster_processes():
        if process.role in ("spare worker", "agent", "other"):
            continue
        try:
            now = vitals_of(process.pid)
        except OSError:
            continue
        then = most.get(process.role)
        if then is not None:
            now = Vitals(
                0,
                max(now.threads, then.threads),
                max(now.files, then.files),
                max(now.resident_bytes, then.resident_bytes),
            )
        most[process.role] = now
    return most


def resident(roles: Mapping[str, str] | None = None) -> dict[str, int]:
    """Resident bytes by role, summed, and of `all` of them; `roles` renames."""
    sums: Counter[str] = Counter()
    for process in cluster_processes():
        try:
            size = vitals_of(process.pid).resident_bytes
        except OSError:
            continue
        sums[(roles or {}).get(process.role, process.role)] += size
        sums["all"] += size
    return dict(sums)
