"""Whether the hosts of a Ray cluster reach each other: asked of each host, since a firewall may stand before any."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.api.errors import EchelonError

CONNECT_SECONDS = 3.0
LOOK_SECONDS = 60.0  # for all hosts together: worker processes have to start


@dataclass(frozen=True, slots=True)
class Door:
    """A port that other hosts have to reach."""

    address: str
    port: int
    what: str


class Listener:
    """A port of the kind that replicas, dispatcher and gangs take: any that is free, on the node's address."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0))
        self._address = address

    def door(self) -> Door:
        """Where it listens."""
        return Door(self._address, self._socket.getsockname()[1], "a free port, as replicas and gangs take them")


def closed_doors(doors: list[Door]) -> list[tuple[Door, str]]:
    """Those that cannot be connected to from here, and why."""
    closed = []
    for door in doors:
        try:
            socket.create_connection((door.address, door.port), timeout=CONNECT_SECONDS).close()
        except OSError as e:
            closed.append((door, e.strerror or str(e) or type(e).__name__))
    return closed


def unreachable() -> list[str]:
    """One line for each port that some host does not reach, of Ray's and of those that Echelon would take."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    doors = []
    for node in nodes:
        address = node["NodeManagerAddress"]
        doors.append(Door(address, node["NodeManagerPort"], "Ray's node manager"))
        doors.append(Door(address, node["ObjectManagerPort"], "Ray's object manager"))
    head, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    doors.append(Door(head, int(port), "Ray's head"))
    there = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    try:
        listeners = [_at(node, ray.remote(Listener)).remote(address) for node, address in there.items()]
        doors += ray.get([listener.door.remote() for listener in listeners], timeout=LOOK_SECONDS)
        asked = {node: _at(node, ray.remote(closed_doors)).remote(doors) for node in there}
        found = {node: ray.get(one, timeout=LOOK_SECONDS) for node, one in asked.items()}
    except RayError as e:
        raise EchelonError(f"the hosts cannot be asked whom they reach: {e}") from e
    return [
        f"{there[node]} does not reach {door.address}:{door.port} ({door.what}): {why}"
        for node, closed in found.items()
        for door, why in closed
    ]


def _at(node: str, remote: Any) -> Any:
    return remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
