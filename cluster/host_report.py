"""What a host says of itself, and what of several hosts does not go together. No Ray."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster import __version__
from cluster.doctor import Finding, foreign_kernels, python_version, shared_memory
from cluster.edge import EdgeSettings, UnfitConfiguration
from cluster.environment import edge_file_if_any, ray_asks_for_token

PACKAGES = ("ray", "torch", "transformers")  # besides our own, which may run from a checkout
EXACT = ("echelon", "ray")  # what travels between processes is theirs
MOST_SKEW = 5.0  # seconds between two clocks; ours only need them for logs


@dataclass(frozen=True, slots=True)
class HostReport:
    """One host. `versions` by package, Python's own included; `clock`: seconds of its wall clock."""

    address: str
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    clock: float
    token: bool  # whether its Ray asks for a token
    edge: str = field(default="", repr=False)  # `digest` of its edge's secret; empty = `echelon node` did not run
    skew: float = 0.0  # seconds by which its clock is before the asker's


def digest(secret: str) -> str:
    """A secret as a host may show it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def report_of_this_host(address: str) -> HostReport:
    """What the start and `echelon doctor` ask of every host."""
    return HostReport(
        address=address,
        versions={
            "python": platform.python_version(),
            "echelon": __version__,
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        findings=(python_version(), foreign_kernels(), shared_memory()),
        clock=time.time(),
        token=ray_asks_for_token(),
        edge=_edge_digest(),
    )


def _edge_digest() -> str:
    path = edge_file_if_any()
    if path is None:
        return ""
    try:
        return digest(EdgeSettings.read(path).secret)
    except UnfitConfiguration:  # a Ray that was started otherwise, or by an older release
        return ""


def faults_of(reports: Sequence[HostReport]) -> list[str]:
    """What would keep these hosts from serving together, one line each, with what to do."""
    lines = [f"{r.address}: {f.text}" for r in reports for f in r.findings if not f.ok]
    for package in ("python", *PACKAGES):
        at: dict[str, list[str]] = defaultdict(list)
        for report in reports:
            version = report.versions[package]
            at[version if package in EXACT else _minor(version)].append(report.address)
        if len(at) > 1:
            found = ", ".join(f"{version} on {' '.join(hosts)}" for version, hosts in sorted(at.items()))
            lines.append(f"not the same {package} everywhere: {found}; install one of them on all hosts")
    if len({r.token for r in reports}) > 1:
        without = " ".join(r.address for r in reports if not r.token)
        lines.append(f"Ray asks for no token on {without}: RAY_AUTH_MODE=token before `ray start`, as on the others")
    if len({r.edge for r in reports}) > 1:
        lines.append(
            "not every host was made ready by `echelon node` with the same token of Ray: "
            + ", ".join(f"{r.address} {f'by {r.edge[:8]}' if r.edge else 'not at all'}" for r in reports)
        )
    return lines


def doubts_of(reports: Sequence[HostReport]) -> list[str]:
    """What is worth a warning, one line each."""
    return [
        f"the clock of {r.address} is {abs(r.skew):.0f} s {'before' if r.skew > 0 else 'behind'} the one here: "
        "lines of logs stand in the wrong order (chrony or ntp help)"
        for r in reports
        if abs(r.skew) > MOST_SKEW
    ]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
