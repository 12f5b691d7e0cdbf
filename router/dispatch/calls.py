"""The dispatcher's choice for callers that do without it: which replica of a deployment takes the next call.

Where replicas record a `LoadReport` as their routing stats, a call is expected to last as a request would. Of others
only the calls themselves are seen: one is taken for a step, whose time depends on how many run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from random import Random
from typing import Any

from router.dispatch.fleet import Fleet, Waiting
from router.dispatch.latency import Speed
from router.dispatch.lease import Acquire
from router.dispatch.strategies import make_strategy
from router.dispatch.table import Demand, Lease, Replica
from router.qos.queue import Fifo, WaitingQueue
from workers.api.replica import LoadReport, ReplicaInfo

STATS = frozenset(f.name for f in fields(LoadReport)) - {"requests"}
_UNKNOWN = 1 << 30  # tokens, blocks: the deployment sees to its own limits
_OUTPUT = 128.0  # tokens of an answer, where nothing is known of it


def routing_stats(load: LoadReport) -> dict[str, float]:
    """What a replica returns from `record_routing_stats`, of plain numbers."""
    return {name: getattr(load, name) for name in STATS}


class CallPolicy:
    """One caller's view. `clock` gives monotonic seconds. Raises ConfigError for an unknown strategy."""

    def __init__(self, strategy: str, *, clock: Callable[[], float], rng: Random) -> None:
        self._clock = clock
        self._strategy = make_strategy(strategy, rng)
        self._replicas: dict[str, Replica] = {}
        self._fleet = Fleet("", WaitingQueue[Waiting](Fifo(), 1), 0)
        self._calls: dict[str, Lease] = {}
        self._seen = 0

    def update(self, stats: Mapping[str, tuple[int, Mapping[str, Any]]]) -> None:
        """Exactly these replicas stand, by id: the calls that each takes at once, and the stats it recorded last."""
        now = self._clock()
        for gone in self._replicas.keys() - stats.keys():
            self._fleet.remove(self._replicas.pop(gone), now)
        for replica_id, (slots, recorded) in stats.items():
            replica = self._replicas.get(replica_id)
            if replica is None:
                self._seen += 1
                info = ReplicaInfo(replica_id, "", "", 0, _UNKNOWN, slots, _UNKNOWN, 1)
                replica = Replica(info, {}, seed=Speed(), trusted=False, now=now, index=self._seen)
                self._replicas[replica_id] = replica
                self._fleet.add(replica)
            report = {name: recorded[name] for name in STATS & recorded.keys()}
            if "step" in report and report["step"] != replica.load.step:
                replica.report(LoadReport(**report), now)

    def order(self, candidates: Iterable[str], prompt_tokens: int = 0) -> list[str]:
        """`candidates`, which `update` named: the strategy's choice, then the others by what is expected of them."""
        now, left = self._clock(), [self._replicas[i] for i in candidates]
        speed = self._fleet.speed(Speed())
        for replica in left:
            replica.fleet = speed
            replica.refresh(now)
        if not left:
            return []
        demand = _demand(prompt_tokens, left, now)
        first = self._strategy.choose(left, demand)
        left.remove(first)
        return [r.info.id for r in (first, *sorted(left, key=lambda r: r.expected(demand)))]

    def began(self, call_id: str, replica_id: str, prompt_tokens: int = 0) -> None:
        """The call runs on `replica_id`; of one that is gone nothing is kept."""
        replica, now = self._replicas.get(replica_id), self._clock()
        if replica is None:
            return
        lease = Lease(Acquire(call_id, "", prompt_tokens, _UNKNOWN), "", replica_id, now, now)
        lease.concurrent = replica.slots + 1
        self._calls[call_id] = lease
        replica.add(call_id, lease, prompt_tokens if replica.load.step >= 0 else 0, now)

    def ended(self, call_id: str) -> None:
        """The call is over, however it ended; unknown ones are left alone."""
        lease = self._calls.pop(call_id, None)
        replica = None if lease is None else self._replicas.get(lease.replica_id)
        if lease is None or replica is None or call_id not in replica.leases:
            return
        now = self._clock()
        replica.observe_lease(lease, now)
        if replica.load.step < 0:
            seconds = now - lease.granted
            replica.model.observe(LoadReport(0, seconds, decode_tokens=lease.concurrent, running=lease.concurrent))
            replica.taught_at = now
        replica.remove(call_id, now)


def _demand(prompt_tokens: int, replicas: Iterable[Replica], now: float) -> Demand:
    if any(replica.load.step >= 0 for replica in replicas):
        return Demand(prompt_tokens, _OUTPUT, 1, at=now)
    return Demand(0, 1.0, 1, at=now)  # the call itself is the step
