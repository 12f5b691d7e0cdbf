"""Limits of the dispatcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.dispatch.latency import Speed
from router.foreign.node import NodeSpec
from router.qos.config import QosConfig
from workers.api.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Limits of the dispatcher; times in seconds."""

    strategy: str = "min_expected_latency"
    models: tuple[str, ...] = ()  # names that will have replicas, besides those that register
    max_waiting: int = 10_000  # requests of one model without a lease
    replica_grace: float = 5.0  # a request waits this long for a first replica of its model
    replay_grace: float = 120.0  # and an accepted one this long: a replacement has to start and load
    exclusion_grace: float = 2.0  # after it an excluded replica is taken, if there is no other
    orphan_grace: float = 5.0  # leases of an ingress that went away
    recovery: float = 3.0  # after the start, until all ingress replicas have come back
    suspect_after: float = 2.5  # without progress, or 10 predicted steps if that is longer; leases then go elsewhere
    replace_failures: int = 5  # canaries that failed one after the other, until the replica is to be replaced
    replace_after: float = 60.0  # suspect for so long without an end, likewise
    canary_every: float = 2.0  # an idle replica proves that it can step; infinite = never
    decode_margin: int = 64  # tokens of room for each choice beyond its prompt
    seed_speed: Speed = Speed()
    qos: QosConfig | None = None  # None: first come, first served
    own_qos: Mapping[str, QosConfig] = field(default_factory=dict)  # of models that have another, by their names
    nodes: tuple[NodeSpec, ...] = ()  # foreign servers that are there from the start

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ConfigError(f"max_waiting must be at least 1, got {self.max_waiting}")
        if self.replace_failures < 1:
            raise ConfigError(f"replace_failures must be at least 1, got {self.replace_failures}")
        if self.canary_every <= 0:
            raise ConfigError(f"canary_every must be positive, got {self.canary_every}")
