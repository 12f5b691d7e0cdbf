"""Where the ranks of replicas go: one bundle a rank, all of a replica on one node where they fit. No Ray in here.

Ray places the bundles; what stands here chooses its strategy, says beforehand what will not fit, and explains what does
not: which bundle, which nodes, what each lacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.environment import GANG_ENV
from workers.api.config import ReplicaConfig

Bundle = Mapping[str, float]  # amounts by resource: CPU, GPU
ONE_NODE, SEVERAL_NODES = "STRICT_PACK", "PACK"  # Ray's strategies; PACK alone may split what would fit on one node
SLACK = 1e-4  # Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the Ray cluster; `free` and `total` are amounts by resource."""

    id: str
    address: str
    free: Bundle
    total: Bundle


@dataclass(frozen=True, slots=True)
class Demand:
    """What one replica asks for: a bundle for each rank."""

    name: str
    bundles: tuple[Bundle, ...]
    model: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """Addresses of the nodes of one replica's ranks, in rank order."""

    name: str
    nodes: tuple[str, ...]
    model: str = ""

    @property
    def spread(self) -> bool:
        """Whether it needs more than one node."""
        return len(set(self.nodes)) > 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How replicas are deployed: Ray's strategy for their bundles, and CPU threads a rank (0: as on one machine)."""

    strategy: str = ONE_NODE
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits, and for what does not, why. `warnings`: why replicas are spread."""

    placed: tuple[Placed, ...]
    refused: tuple[str, ...]
    warnings: tuple[str, ...]

    def strategy(self, model: str) -> str:
        """Ray's, for all replicas of `model` alike."""
        return SEVERAL_NODES if any(one.spread for one in self.placed if one.model == model) else ONE_NODE

    def has_room(self, model: str) -> bool:
        """Whether one of its replicas fits, at least."""
        return any(one.model == model for one in self.placed)

    def most_on_a_node(self) -> int:
        """Ranks on the node that has the most of them; at least 1."""
        return max(Counter(node for one in self.placed for node in one.nodes).values(), default=1)


def plan(demands: Iterable[Demand], nodes: Sequence[Node]) -> Plan:
    """Place `demands` in order. Those that fit on one node come first, each where most is free of what is scarcest."""
    rooms = [_Room(node, dict(node.free)) for node in nodes]
    placed, spread, refused = [], [], []
    for demand in demands:
        fitting = [room for room in rooms if room.holds(demand.bundles)]
        if not fitting:
            spread.append(demand)
            continue
        room = max(fitting, key=lambda room: room.share_after(demand.bundles))
        room.take(demand.bundles)
        placed.append(Placed(demand.name, (room.node.address,) * len(demand.bundles), demand.model))
    warnings = []
    for demand in spread:
        taken = [dict(room.free) for room in rooms]
        homes = _over_several(demand.bundles, rooms)
        if isinstance(homes, int):
            refused.append(f"{demand.name} cannot be placed: {_why_not(demand.bundles, homes, rooms)}")
            for room, free in zip(rooms, taken, strict=True):  # it takes nothing: a smaller one may fit
                room.free = free
            continue
        placed.append(Placed(demand.name, homes, demand.model))
        if len(set(homes)) > 1:
            over = ", ".join(dict.fromkeys(homes))
            warnings.append(f"{demand.name} is spread over {over}: {_why_spread(demand.bundles, nodes)}")
    return Plan(tuple(placed), tuple(refused), tuple(warnings))


def explain(bundles: Sequence[Bundle], strategy: str, nodes: Sequence[Node]) -> str | None:
    """Why Ray has not placed `bundles` with `strategy`; None where they would fit by now."""
    rooms = [_Room(node, dict(node.free)) for node in nodes]
    if strategy == ONE_NODE:
        if any(room.holds(bundles) for room in rooms):
            return None
        if len(bundles) > 1:
            whole = _sum(bundles)
            return f"no node has room for all of its {len(bundles)} ranks, {_said(whole)}: {_lacks(whole, rooms)}"
        return _why_not(bundles, 0, rooms)
    homes = _over_several(bundles, rooms)
    return _why_not(bundles, homes, rooms) if isinstance(homes, int) else None


def ranks_by_node(homes: Mapping[int, str]) -> list[int]:
    """Bundle indices in rank order, ranks of one node next to each other, bundle 0 first. `homes`: node by bundle."""
    order = {home: at for at, home in enumerate(dict.fromkeys(homes[index] for index in sorted(homes)))}
    return sorted(homes, key=lambda index: (order[homes[index]], index))


def rank_bundles(config: ReplicaConfig) -> list[dict[str, float]]:
    """One bundle for each rank, in rank order. `config.device` is resolved (cpu or cuda)."""
    bundle: dict[str, float] = {"CPU": 1.0}
    if config.device == "cuda":
        bundle["GPU"] = 1.0
    return [dict(bundle) for _ in range(config.tensor_parallel)]


def replica_demands(config: ReplicaConfig, replicas: int) -> list[Demand]:
    """What `replicas` replicas ask for."""
    bundles, name = tuple(rank_bundles(config)), config.model.name
    return [Demand(f"replica {n + 1} of {replicas} of {name}", bundles, name) for n in range(replicas)]


def rank_options(config: ReplicaConfig) -> dict[str, Any]:
    """Options of a rank's actor; `run` holds one of its two threads, `stop` needs the other."""
    options: dict[str, Any] = {
        "num_cpus": 1,
        "num_gpus": 1 if config.device == "cuda" else 0,
        "max_restarts": 0,
        "max_concurrency": 2,
    }
    if config.device == "cuda" and config.tensor_parallel > 1:
        options["runtime_env"] = {"env_vars": GANG_ENV}
    return options


@dataclass(slots=True)
class _Room:
    """What is left of a node while a plan is made."""

    node: Node
    free: dict[str, float] = field(default_factory=dict)

    def holds(self, bundles: Sequence[Bundle]) -> bool:
        return all(self.free.get(name, 0.0) + SLACK >= amount for name, amount in _sum(bundles).items())

    def take(self, bundles: Sequence[Bundle]) -> None:
        for name, amount in _sum(bundles).items():
            self.free[name] = self.free.get(name, 0.0) - amount

    def share_after(self, bundles: Sequence[Bundle]) -> float:
        """Of what `bundles` take here, the least part that would still be free."""
        return min((self.free[name] - amount) / self.node.total[name] for name, amount in _sum(bundles).items())


def _over_several(bundles: Sequence[Bundle], rooms: Sequence[_Room]) -> tuple[str, ...] | int:
    """Take room for each of `bundles`, as many as fit on the roomiest node, then on the next: addresses in rank order.

    An int is the first bundle that fits nowhere.
    """
    homes: list[str] = []
    while len(homes) < len(bundles):
        rest = bundles[len(homes) :]
        counts = [(_how_many(room, rest), -at) for at, room in enumerate(rooms)]
        count, at = max(counts, default=(0, 0))
        if count == 0:
            return len(homes)
        rooms[-at].take(rest[:count])
        homes += [rooms[-at].node.address] * count
    return tuple(homes)


def _how_many(room: _Room, bundles: Sequence[Bundle]) -> int:
    return next((n for n in range(len(bundles), 0, -1) if room.holds(bundles[:n])), 0)


def _why_spread(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> str:
    need = f"its {len(bundles)} ranks need {_said(_sum(bundles))}"
    if any(_Room(node, dict(node.total)).holds(bundles) for node in nodes):
        return f"{need}, and no node has that much free"
    return f"{need}, more than any node has ({_totals(nodes, _sum(bundles))})"


def _why_not(bundles: Sequence[Bundle], index: int, rooms: Sequence[_Room]) -> str:
    after = f" beside the {index} before it" if index else ""
    which = f"bundle {index} of {len(bundles)} ({_said(bundles[index])}) fits on no node{after}"
    return f"{which}: {_lacks(bundles[index], rooms)}" if rooms else f"{which}: there is none"


def _lacks(wanted: Bundle, rooms: Sequence[_Room]) -> str:
    lines = []
    for room in rooms:
        missing = [
            f"{_amount(name, amount - room.free.get(name, 0.0))} ({room.free.get(name, 0.0):g} of "
            f"{room.node.total.get(name, 0.0):g} free)"
            for name, amount in wanted.items()
            if room.free.get(name, 0.0) + SLACK < amount
        ]
        lacks = f"lacks {' and '.join(missing)}" if missing else "has room"
        lines.append(f"{room.node.address} {lacks}")
    return "; ".join(lines)


def _totals(nodes: Sequence[Node], wanted: Bundle) -> str:
    return "; ".join(f"{n.address} has {_said({name: n.total.get(name, 0.0) for name in wanted})}" for n in nodes)


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _said(bundle: Bundle) -> str:
    return ", ".join(_amount(name, amount) for name, amount in bundle.items())


def _amount(name: str, amount: float) -> str:
    return f"{amount:g} {name}"
