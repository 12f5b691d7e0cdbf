"""`echelon drain`: take one replica, or all of a node, out of a running cluster without a client noticing.

Import only after `cluster.environment.prepare_ray`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2

from cluster.app import Progress, join_ray
from cluster.names import DISPATCHER, NAMESPACE
from router.dispatch.lease import ReplicaRow
from workers.api.errors import ConfigError, EchelonError

POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the Ray cluster that is alive."""

    id: str  # hex
    address: str
    hostname: str
    is_head: bool


def alive_nodes() -> list[Node]:
    """All of them."""
    return [
        Node(n["NodeID"], n["NodeManagerAddress"], n["NodeManagerHostname"], "node:__internal_head__" in n["Resources"])
        for n in ray.nodes()
        if n["Alive"]
    ]


def find_target(target: str, rows: list[ReplicaRow], nodes: list[Node]) -> ReplicaRow | Node:
    """The replica or node that `target` names: an id or how it begins, a node's address or host name.

    Raises ConfigError, with all that there is, unless it is exactly one.
    """
    replicas = [r for r in rows if r.info.id.startswith(target) and not r.info.url]
    hosts = [n for n in nodes if n.id.startswith(target) or target in (n.address, n.hostname)]
    found: list[ReplicaRow | Node] = [*replicas, *hosts]
    if len(found) == 1 and target:
        return found[0]
    there = [f"replica {r.info.id} of {r.info.model} on node {r.info.node[:8]}" for r in rows if not r.info.url]
    there += [f"node {n.id[:8]} ({n.hostname}, {n.address}{', the head' if n.is_head else ''})" for n in nodes]
    what = "nothing is called" if not found else "several are called"
    raise ConfigError(f"{what} {target!r} here; there are: {'; '.join(there)}")


def drain(target: str, *, address: str, timeout: float, progress: Progress) -> str:
    """Drain the replica or node `target` of the cluster in Ray at `address`; what to print. Raises EchelonError.

    A replica gets no new leases, its requests end or, after the model's drain_timeout, go on elsewhere; then it ends,
    and Serve starts another one. A node gets no new replicas either: those on it are started elsewhere first.
    `timeout`: seconds to wait for it.
    """
    join_ray(address)
    try:
        dispatcher = _dispatcher(address)
        found = find_target(target, list(ray.get(dispatcher.status.remote()).rows), alive_nodes())
        if isinstance(found, Node):
            return _drain_node(dispatcher, found, timeout, progress)
        ray.get(dispatcher.retire.remote(found.info.id))
        _await_gone(dispatcher, {found.info.id}, timeout, progress)
        return f"replica {found.info.id} is drained and gone; Serve starts another one"
    finally:
        ray.shutdown()


def _dispatcher(address: str) -> Any:
    try:
        return ray.get_actor(DISPATCHER, namespace=NAMESPACE)
    except ValueError as e:
        raise EchelonError(f"no Echelon runs in the Ray cluster at {address}") from e


def _drain_node(dispatcher: Any, node: Node, timeout: float, progress: Progress) -> str:
    if node.is_head:
        raise ConfigError(
            f"node {node.id[:8]} is the head, without which there is no cluster: drain its replicas instead"
        )
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # for good, though it is not idle
    deadline_ms = int((time.time() + timeout) * 1000)
    accepted, why_not = client.drain_node(node.id, reason, "echelon drain", deadline_ms)
    if not accepted:
        raise EchelonError(f"Ray does not drain node {node.id[:8]}: {why_not}")
    rows = ray.get(dispatcher.status.remote()).rows
    victims = {r.info.id for r in rows if r.info.node == node.id}
    _await_gone(dispatcher, victims, timeout, progress)
    return f"node {node.id[:8]} ({node.hostname}) is drained of {len(victims)} replicas, and gets none any more"


def _await_gone(dispatcher: Any, victims: set[str], timeout: float, progress: Progress) -> None:
    """Return once none of `victims` is in the dispatcher's table. Raises EchelonError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while left := [r for r in ray.get(dispatcher.status.remote()).rows if r.info.id in victims]:
        said = ", ".join(f"{r.info.id}: {r.state}, {r.leases} requests" for r in left)
        if time.monotonic() > deadline:
            raise EchelonError(f"not drained within {timeout:g} s: {said}")
        progress(said)
        time.sleep(POLL_SECONDS)
