"""What on this machine would keep Echelon from working: asked by `echelon doctor` and before every start."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass

from workers.api.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `text` says what to do where `ok` is false."""

    ok: bool
    text: str


def foreign_kernels() -> Finding:
    """A distribution called `kernels` would stand in the way of our package of that name."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return Finding(True, "no foreign distribution called `kernels`")
    return Finding(False, f"the distribution `kernels` {version} hides ours: pip uninstall kernels")


def python_version() -> Finding:
    """3.11 and 3.12 are tested."""
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding((3, 11) <= sys.version_info[:2] < (3, 13), f"Python {found} (3.11 and 3.12 are tested)")


def shared_memory() -> Finding:
    """Ray's object store and our step plans live there."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return Finding(free >= 200 << 20, f"/dev/shm has {free >> 20} MiB free (200 needed: mount a larger one)")


def packages() -> Finding:
    """The versions that were tested are those of pyproject.toml."""
    found = {n: importlib.metadata.version(n) for n in ("ray", "torch", "transformers", "fastapi")}
    return Finding(True, ", ".join(f"{n} {v}" for n, v in found.items()))


def examine() -> list[Finding]:
    """All findings, in the order of a report."""
    return [python_version(), packages(), foreign_kernels(), shared_memory()]


def refuse_if_unfit() -> None:
    """Raise ConfigError with every bad finding."""
    bad = [f.text for f in examine() if not f.ok]
    if bad:
        raise ConfigError("this machine is not fit yet:\n  " + "\n  ".join(bad))
