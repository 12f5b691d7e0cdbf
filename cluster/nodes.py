"""The hosts of a Ray cluster: who has joined, and what each says of itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.access import node_edge_secret
from cluster.config import PlacementSection
from cluster.environment import ray_token
from cluster.first_answer import cause
from cluster.host_report import HostReport, digest, faults_of, report_of_this_host
from workers.api.errors import ConfigError, EchelonError

POLL_SECONDS = 0.5
LOOK_SECONDS = 30.0  # for a host to say what it is: a worker process has to start there

Progress = Callable[[str], None]


def alive_nodes() -> dict[str, str]:
    """Addresses of the nodes that have joined and live, by Ray's node id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def await_nodes(wanted: PlacementSection, progress: Progress) -> None:
    """Return once `wanted.nodes` have joined. Raises EchelonError with those that have when `wanted.wait` is over."""
    deadline, said = time.monotonic() + wanted.wait, 0
    while len(found := sorted(alive_nodes().values())) < wanted.nodes:
        text = f"{len(found)} of {wanted.nodes} nodes have joined ({', '.join(found)})"
        if time.monotonic() > deadline:
            raise EchelonError(
                f"{text} within {wanted.wait:g} s: see Ray's log on the others (ray start there), or wait longer "
                "(placement.wait in the cluster file)"
            )
        if len(found) != said:
            progress(text)
            said = len(found)
        time.sleep(POLL_SECONDS)


def survey() -> list[HostReport]:
    """What every live node says of itself, by address. Raises EchelonError with those that say nothing."""
    look = ray.remote(report_of_this_host)
    asked = {}
    for node, address in alive_nodes().items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        one = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(address)
        asked[one] = address
    reports, deadline = [], time.monotonic() + LOOK_SECONDS
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise EchelonError(f"no word from {', '.join(sorted(asked.values()))} within {LOOK_SECONDS:.0f} s")
        address = asked.pop(ready[0])
        try:
            report: HostReport = ray.get(ready[0])
        except RayError as e:
            raise EchelonError(f"{address} cannot say what is there: {cause(str(e))}") from e
        reports.append(dataclasses.replace(report, skew=report.clock - time.time()))
    return sorted(reports, key=lambda report: report.address)


def refuse_unlike_hosts(reports: list[HostReport]) -> None:
    """Raise ConfigError with everything that keeps these hosts from serving together."""
    if faults := faults_of(reports):
        raise ConfigError("these hosts cannot serve together:\n  " + "\n  ".join(faults))


def have_our_edge(reports: list[HostReport]) -> bool:
    """Whether every host was made ready by `echelon node`, with the token of Ray that this one has."""
    if not all(report.edge for report in reports):
        return False
    return {report.edge for report in reports} == {digest(node_edge_secret(ray_token()))}
