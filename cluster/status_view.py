"""What `echelon status` shows: nodes, replicas with the nodes of their ranks, what waits. No Ray."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.placement import Node
from router.dispatch.lease import ReplicaRow, ReplicaTable


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica; its id is its generation. `ranks` are the addresses of their nodes, in rank order."""

    id: str
    model: str
    state: str
    ranks: tuple[str, ...]
    pid: int  # of rank 0
    running: int  # sequences with a slot
    waiting: int  # sequences in the engine without one
    leases: int
    free_blocks: int
    total_blocks: int
    step_seconds: float  # of the next decode step, as learned
    since_step: float | None  # seconds since it completed a step, a canary's too; None before the first


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster at one moment. `unplaced` has a line for each replica that waits for room, with the reason."""

    nodes: tuple[Node, ...]
    replicas: tuple[ReplicaView, ...]
    fronts: tuple[str, ...]
    waiting: Mapping[str, int]  # requests without a lease, by model
    unplaced: tuple[str, ...]

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def as_text(self) -> str:
        """Some lines for people."""
        lines = [f"{len(self.nodes)} nodes"]
        for node in self.nodes:
            amounts = ", ".join(f"{node.free[k]:g} of {node.total[k]:g} {k} free" for k in node.total if node.total[k])
            here = [
                f"{one.id}[{rank}]" for one in self.replicas for rank, at in enumerate(one.ranks) if at == node.address
            ]
            lines.append(f"  {node.address}: {amounts or 'no CPU or GPU for ranks'}; ranks: {' '.join(here) or 'none'}")
        lines.append(f"{len(self.replicas)} replicas")
        lines += [f"  {_replica_line(one)}" for one in self.replicas]
        lines += [f"  warning: {line}" for line in self.unplaced]
        waits = ", ".join(f"{count} of {model}" for model, count in self.waiting.items() if count) or "none"
        lines.append(f"requests without a lease: {waits}; fronts: {len(self.fronts)}")
        return "\n".join(lines)


def view_of(
    table: ReplicaTable, nodes: Sequence[Node], homes: Mapping[str, Sequence[str]], *, fronts: Sequence[str],
    unplaced: Sequence[str],
) -> ClusterView:  # fmt: skip
    """The view of the dispatcher's `table`; `homes`: node ids of the ranks, by replica."""
    addresses = {node.id: node.address for node in nodes}
    return ClusterView(
        nodes=tuple(nodes),
        replicas=tuple(_replica_view(row, homes, addresses) for row in table.rows),
        fronts=tuple(fronts),
        waiting=dict(table.waiting_by_model),
        unplaced=tuple(unplaced),
    )


def _replica_view(row: ReplicaRow, homes: Mapping[str, Sequence[str]], addresses: Mapping[str, str]) -> ReplicaView:
    info, load = row.info, row.load
    ranks = homes.get(info.id, (info.node,) if info.node else ())
    return ReplicaView(
        id=info.url or info.id,
        model=info.model,
        state=row.state.value,
        ranks=tuple(addresses.get(node, "a node that is gone") for node in ranks),
        pid=info.pid,
        running=load.running,
        waiting=load.waiting,
        leases=row.leases,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        step_seconds=row.step_seconds,
        since_step=None if row.since_step == float("inf") else row.since_step,
    )


def _replica_line(one: ReplicaView) -> str:
    where = ", ".join(f"rank {rank} on {node}" for rank, node in enumerate(one.ranks)) or "elsewhere"
    step = "no step yet" if one.since_step is None else f"last step {one.since_step:.1f} s ago"
    return (
        f"{one.id} of {one.model}: {one.state}, {step}; {where}; {one.running} run, {one.waiting} wait, "
        f"{one.leases} leases; {one.free_blocks} of {one.total_blocks} blocks free"
    )
