"""What room a Ray cluster has for replicas, and which of them wait for some."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
from ray._private.state import available_resources_per_node  # Ray's public functions know sums over all nodes only

from cluster.config import PlacementSection
from cluster.placement import Demand, Node, Plan, explain, plan, ranks_by_node
from workers.api.errors import EchelonError

POLL_SECONDS = 1.0
SETTLE_SECONDS = 3.0  # until what just joined, or just ended, is in Ray's books
COUNTED = ("CPU", "GPU")
WAITS = "waits for room"
GROUP_PREFIX = "SERVE_REPLICA::"  # Serve names the placement group of a replica after its actor

Progress = Callable[[str], None]


def nodes_with_room() -> list[Node]:
    """The nodes that live, by address, and what is free on each of what ranks take."""
    free = available_resources_per_node()
    nodes = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            {name: free.get(node["NodeID"], {}).get(name, 0.0) for name in COUNTED},
            {name: node["Resources"].get(name, 0.0) for name in COUNTED},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: node.address)


def await_room(demands: Sequence[Demand], wanted: PlacementSection, progress: Progress) -> Plan:
    """The plan for all replicas, once they fit or `wanted.wait` is over; what is spread, or waits, is said.

    Raises EchelonError where not even one of some model fits.
    """
    from ray.autoscaler.sdk import request_resources  # only here: a start on one machine does without

    deadline, said = time.monotonic() + max(wanted.wait, SETTLE_SECONDS), ""
    while True:
        made = plan(demands, nodes_with_room())
        text = "\n".join(made.refused)
        if not made.refused or time.monotonic() >= deadline:
            break
        if text != said:
            progress(text)
            said = text
            request_resources(bundles=[dict(b) for demand in demands for b in demand.bundles])  # of the autoscaler
        time.sleep(POLL_SECONDS)
    if said:
        request_resources(bundles=[])  # from here on the placement groups say what is needed
    if not all(made.has_room(demand.model) for demand in demands):
        raise EchelonError("\n".join(made.refused))
    for line in (*made.warnings, *made.refused):
        progress(f"warning: {line}")
    return made


def rank_homes() -> dict[str, list[str]]:
    """Node ids of the ranks of each replica that was placed, in rank order, by the replica's id."""
    homes = {}
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(GROUP_PREFIX) and group["state"] == "CREATED":
            by_bundle = group["bundles_to_node_id"]
            homes[_replica_id(group["name"])] = [by_bundle[index] for index in ranks_by_node(by_bundle)]
    return homes


def _replica_id(group: str) -> str:
    return group.rpartition("#")[2]


def waiting_replicas() -> list[str]:
    """One line for each replica that Ray has not placed: which bundle, which nodes, what each lacks."""
    groups = ray.util.placement_group_table().values()
    waiting = [group for group in groups if group["state"] in ("PENDING", "RESCHEDULING")]
    if not waiting:
        return []
    nodes, lines = nodes_with_room(), []
    for group in waiting:
        if not group["name"].startswith(GROUP_PREFIX):
            continue
        bundles = [group["bundles"][index] for index in sorted(group["bundles"])]
        why = explain(bundles, group["strategy"], nodes)
        lines.append(
            f"replica {_replica_id(group['name'])} {WAITS}: {why or 'there is some by now, Ray will see it soon'}"
        )
    return lines
