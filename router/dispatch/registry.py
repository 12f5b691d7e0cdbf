"""Every fleet and every replica: who is registered, which model it serves, and whether it is well."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from router.dispatch.config import DispatcherConfig
from router.dispatch.fleet import Fleet, Waiting
from router.dispatch.lease import Acquire, ReplicaState
from router.dispatch.leases import Leases
from router.dispatch.table import Replica, blocks_needed
from router.qos.queue import Room
from workers.api.replica import ReplicaInfo


class Registry:
    """`make_room` gives the fleet of a model its waiting room. `started` is when the dispatcher came up, in seconds."""

    def __init__(
        self, config: DispatcherConfig, leases: Leases, *, make_room: Callable[[str], Room[Waiting]], started: float
    ) -> None:
        self.config = config
        self.replicas: dict[str, Replica] = {}
        self.by_model: dict[str, Fleet] = {}
        self._leases, self._make_room = leases, make_room
        self._models = set(config.models)  # configured, or seen
        self._recovered_at = started + config.recovery
        self._registered = 0

    @property
    def fleets(self) -> Iterable[Fleet]:
        """All of them, also those without replicas."""
        return self.by_model.values()

    def knows(self, model: str) -> bool:
        """Whether `model` has, had or will have replicas; of a dispatcher that was told of none every name may."""
        return not self._models or model in self._models

    def fleet(self, model: str) -> Fleet:
        """The fleet of `model`, an empty one if it has none yet."""
        fleet = self.by_model.get(model)
        if fleet is None:
            fleet = self.by_model[model] = Fleet(model, self._make_room(model), self.config.decode_margin)
        return fleet

    def get(self, replica_id: str) -> Replica | None:
        """The replica, if it is registered."""
        return self.replicas.get(replica_id)

    def blocks(self, request: Acquire, info: ReplicaInfo) -> int:
        """Blocks that `request` holds on `info`."""
        return min(blocks_needed(request, info.block_size, self.config.decode_margin), info.num_blocks)

    def add(self, info: ReplicaInfo, speed: float | None, now: float) -> None:
        """`info`, which is not registered, may be chosen from now on."""
        self._models.add(info.model)
        fleet = self.fleet(info.model)
        leases = self._leases.on(info.id)
        for lease in leases.values():
            lease.blocks = self.blocks(lease.request, info)
        seed = self.config.seed_speed
        seed = fleet.speed(seed) if speed is None else seed.scaled(speed)
        self._registered += 1
        replica = Replica(info, leases, seed=seed, trusted=speed is not None, now=now, index=self._registered)
        replica.recovering = now < self._recovered_at
        self.replicas[info.id] = replica
        fleet.add(replica)

    def remove(self, replica_id: str, now: float) -> None:
        """It is registered no more; unknown ids are left alone."""
        replica = self.replicas.pop(replica_id, None)
        if replica is not None:
            self.by_model[replica.info.model].remove(replica, now)

    def drain(self, replica_id: str, now: float) -> None:
        """It is chosen no more; unknown ids are left alone."""
        replica = self.replicas.get(replica_id)
        if replica is not None:
            replica.draining = True
            replica.refresh(now)

    def watch(self, now: float) -> None:
        """Who makes no progress becomes suspect, and what was learned long ago fades."""
        for fleet in self.fleets:
            speed = fleet.speed(self.config.seed_speed)
            for replica in fleet.replicas:
                replica.fleet = speed
                replica.recovering = now < self._recovered_at
                replica.watch(now, self.config.suspect_after)

    def hung(self, now: float) -> list[str]:
        """Those whose leases should go elsewhere, where there is such a place."""
        return [
            replica.info.id
            for fleet in self.fleets
            for replica in fleet.replicas
            if replica.is_hung(now, self.config.suspect_after)
            and any(other.state is ReplicaState.READY for other in fleet.replicas)
        ]

    def canaries(self, now: float) -> list[str]:
        """Those that are to make a canary token now, which counts as sent."""
        due = [r for r in self.replicas.values() if r.canary_due(now, self.config.canary_every)]
        for replica in due:
            replica.canary.send(now)
        return [replica.info.id for replica in due]
