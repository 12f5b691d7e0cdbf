"""`echelon doctor --address`: whether the hosts of a Ray cluster can serve together."""

from __future__ import annotations

import ray

from cluster.app import join_ray
from cluster.doctor import Finding
from cluster.host_report import HostReport, doubts_of, faults_of
from cluster.nodes import have_our_edge, survey
from cluster.reach import unreachable
from cluster.room import nodes_with_room, waiting_replicas


def examine_cluster(address: str) -> list[Finding]:
    """What is found on every host of the Ray cluster at `address`, and between them. Raises EchelonError."""
    join_ray(address)
    try:
        reports = survey()
        room = {node.address: node for node in nodes_with_room()}
        seen = [Finding(True, _host_line(one, dict(room[one.address].total))) for one in reports if one.address in room]
        edge = (
            "runs" if have_our_edge(reports) else "does not run: HTTP goes through the proxies of that Ray's own Serve"
        )
        seen.append(Finding(True, f"Echelon's HTTP edge {edge}"))
        if not all(one.token for one in reports):
            seen.append(
                Finding(False, "Ray asks for no token: whoever reaches its ports may run anything (see deploy/)")
            )
        bad = [*faults_of(reports), *doubts_of(reports), *unreachable(), *waiting_replicas()]
        return seen + [Finding(False, line) for line in bad]
    finally:
        ray.shutdown()


def _host_line(report: HostReport, total: dict[str, float]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in total.items() if amount)
    shared = next((f.text for f in report.findings if f.text.startswith("/dev/shm")), "")
    return f"{report.address}: {versions}; {amounts or 'nothing for ranks'}; {shared}; clock {report.skew:+.1f} s"
