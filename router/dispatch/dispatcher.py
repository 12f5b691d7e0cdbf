"""The dispatcher: a plain object without I/O. What it has to tell others comes back from the calls as replies.

Every request that comes in ends exactly once: settled, cancelled, lost or refused; `ledger` proves it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from router.dispatch.fleet import Fleet, Waiting
from router.dispatch.latency import OutputLengths, Speed
from router.dispatch.lease import (
    Acquire,
    Granted,
    LeaseLost,
    Outcome,
    Refusal,
    Refused,
    ReplicaRow,
    Reregister,
    Settle,
)
from router.dispatch.ledger import Ends, Ledger
from router.dispatch.strategies import make_strategy
from router.dispatch.table import Demand, Lease, Replica, blocks_needed
from router.qos.config import QosConfig
from router.qos.fair_queue import Facts, FairQueue
from router.qos.ledger import Prices
from router.qos.policy import Limits
from router.qos.queue import Fifo, Ordering, Room, WaitingQueue
from workers.api.errors import ConfigError
from workers.api.replica import LoadReport, ReplicaInfo

_FLOOR_BOUND = 100_000.0  # units, some long leases: what a tier with a floor can be owed at most
_LOOK_PAST = 32  # waiting requests that only their exclusions hold back are passed over, this many at once

log = logging.getLogger("echelon.dispatcher")


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Limits of the dispatcher; times in seconds."""

    strategy: str = "min_expected_latency"
    models: tuple[str, ...] = ()  # names that will have replicas, besides those that register
    max_waiting: int = 10_000  # requests of one model without a lease
    replica_grace: float = 5.0  # a request waits this long for a first replica of its model
    replay_grace: float = 30.0  # and an accepted one this long
    exclusion_grace: float = 2.0  # after it an excluded replica is taken, if there is no other
    orphan_grace: float = 5.0  # leases of an ingress that went away
    recovery: float = 3.0  # after the start, until all ingress replicas have come back
    suspect_after: float = 3.0  # without progress, or 10 predicted steps if that is longer
    canary_every: float = 2.0  # an idle replica proves that it can step; infinite = never
    decode_margin: int = 64  # tokens of room for each choice beyond its prompt
    seed_speed: Speed = Speed()
    qos: QosConfig | None = None  # None: first come, first served

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ConfigError(f"max_waiting must be at least 1, got {self.max_waiting}")
        if self.canary_every <= 0:
            raise ConfigError(f"canary_every must be positive, got {self.canary_every}")


@dataclass(frozen=True, slots=True)
class Reply:
    """`message` is for the ingress called `client`."""

    client: str
    message: Granted | Refused | LeaseLost


class Dispatcher:
    """Leases of replicas to requests. `clock` gives monotonic seconds."""

    def __init__(
        self,
        config: DispatcherConfig,
        *,
        clock: Callable[[], float],
        rng: Random,
        ordering: Ordering[Waiting] | None = None,
    ) -> None:
        self.config = config
        self._clock = clock
        self._ordering: Ordering[Waiting] = ordering or Fifo()
        self._qos = config.qos
        self._prices = Prices()
        self._strategy = make_strategy(config.strategy, rng)
        self._outputs = OutputLengths()
        self._replicas: dict[str, Replica] = {}
        self._fleets: dict[str, Fleet] = {}
        self._models = set(config.models)  # configured, or seen
        self._on: dict[str, dict[str, Lease]] = {}  # by replica, registered or not yet
        self._leases: dict[str, Lease] = {}
        self._gone: dict[str, float] = {}  # clients away since
        self._shed: list[Reply] = []
        self._ends = Ends()
        self._hold_seconds = 2.0  # what a lease lasts, learned
        self._recovered_at = clock() + config.recovery
        self._registered = 0

    # requests

    def acquire(self, client: str, request: Acquire) -> Granted | Refused | None:
        """A lease now, a refusal, or None: it waits, and the answer comes out of a later call.

        An id that is known already is not taken twice.
        """
        held = self._leases.get(request.lease_id)
        if held is not None:
            replica = self._replicas.get(held.replica_id)
            return None if replica is None else Granted(request.lease_id, replica.info, 0.0, 0.0)
        if any(request.lease_id in fleet.queue for fleet in self._fleets.values()):
            return None
        self._ends.acquired += 1
        now = self._clock()
        if self._models and request.model not in self._models and not request.accepted:
            self._ends.refused += 1
            return Refused(request.lease_id, Refusal.UNKNOWN_MODEL, request.model)
        fleet = self._fleet(request.model)
        waiting = Waiting(request, client, now - max(request.age, 0.0), now)
        refusal = self._refusal(waiting, fleet)
        if refusal is not None:
            self._ends.refused += 1
            return refusal
        self._make_place(waiting, fleet)
        fleet.queue.push(request.lease_id, waiting)
        if fleet.queue.peek() is waiting:  # a replay may come before all others
            granted = self._try(waiting, fleet, now)
            if granted is not None:
                fleet.queue.granted(request.lease_id)
                return granted
        return None

    def shed(self) -> list[Reply]:
        """Refusals of requests that `acquire` took out of the queue for one of a higher tier; each comes once."""
        shed, self._shed = self._shed, []
        return shed

    def settle(self, settled: Settle) -> list[Reply]:
        """The lease's room is free again and its work is learned from. A lease that has ended already is left alone."""
        lease = self._leases.get(settled.lease_id)
        if lease is None:
            self._ends.late += 1
            return []
        now = self._clock()
        replica = self._replicas.get(lease.replica_id)
        if settled.outcome is Outcome.COMPLETED:
            request = lease.request
            if not request.resumed_tokens:
                self._outputs.observe(request.owner, request.route, settled.output_tokens / request.choices)
            self._hold_seconds += 0.05 * (now - lease.granted - self._hold_seconds)
            if replica is not None:
                replica.observe_lease(lease, now)
        elif settled.outcome is Outcome.LOST and replica is not None:
            replica.suspect = True
        self._charge(lease.request, settled)
        self._drop(settled.lease_id, now)
        self._ends.settled += 1
        return self._release(lease.request.model)

    def cancel(self, lease_id: str) -> list[Reply]:
        """The request is forgotten, whether it waits or holds a lease; unknown ids are left alone."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._drop(lease_id, self._clock())
            self._ends.cancelled += 1
            return self._release(lease.request.model)
        for model, fleet in self._fleets.items():
            if fleet.queue.remove(lease_id) is not None:
                self._ends.cancelled += 1
                return self._release(model)  # it may have been the head that blocked others
        self._ends.late += 1
        return []

    # ingress replicas

    def reregister(self, client: str, message: Reregister) -> list[Reply]:
        """`client` holds and waits for exactly what `message` says; whatever else stood here for it is cancelled."""
        now = self._clock()
        self._gone.pop(client, None)
        held = {h.request.lease_id: h for h in message.held}
        self._forget(client, keep=set(held), now=now)
        replies: list[Reply] = []
        for lease_id, h in held.items():
            if lease_id in self._leases:
                continue
            self._ends.acquired += 1
            lease = Lease(h.request, client, h.replica_id, now - max(h.request.age, 0.0), now)
            self._fleet(h.request.model).queue.adopt(lease_id, Waiting(h.request, client, lease.arrived, now))
            replica = self._replicas.get(h.replica_id)
            if replica is None:
                self._leases[lease_id] = lease
                self._on.setdefault(h.replica_id, {})[lease_id] = lease
            else:
                lease.blocks = self._blocks(h.request, replica.info)
                self._hold(lease, replica, 0, now)
        for request in message.waiting:
            answer = self.acquire(client, request)
            if answer is not None:
                replies.append(Reply(client, answer))
        return replies + self._release_all()

    def client_gone(self, client: str) -> list[Reply]:
        """Its waiting requests are cancelled; its leases stand for `orphan_grace` seconds, unless it comes back."""
        self._gone[client] = self._clock()
        self._forget_waiting(client)
        return self._release_all()

    # replicas

    def replica_up(self, info: ReplicaInfo, speed: float | None = None) -> list[Reply]:
        """`info` gets leases from now on. `speed` (prefill tokens a second) is believed until it was measured."""
        if info.id in self._replicas:
            return []
        now = self._clock()
        self._models.add(info.model)
        fleet = self._fleet(info.model)
        leases = self._on.setdefault(info.id, {})
        for lease in leases.values():
            lease.blocks = self._blocks(lease.request, info)
        seed = self.config.seed_speed
        seed = fleet.speed(seed) if speed is None else seed.scaled(speed)
        self._registered += 1
        replica = Replica(info, leases, seed=seed, trusted=speed is not None, now=now, index=self._registered)
        replica.recovering = now < self._recovered_at
        self._replicas[info.id] = replica
        fleet.add(replica)
        return self._release(info.model)

    def replica_down(self, replica_id: str, reason: str = "removed", *, died: bool = True) -> list[Reply]:
        """`replica_id` is no more; each lease on it is reported lost, once. Unknown ids only lose what was on them."""
        now = self._clock()
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._fleets[replica.info.model].remove(replica, now)
        lost = self._on.pop(replica_id, {})
        replies = []
        for lease_id, lease in lost.items():
            del self._leases[lease_id]
            self._fleet(lease.request.model).queue.ended(lease_id)
            self._ends.lost += 1
            replies.append(Reply(lease.client, LeaseLost(lease_id, replica_id, reason, died)))
        return replies

    def drain(self, replica_id: str) -> int:
        """`replica_id` gets no new leases; the number that it still has. Unknown ids have none."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return len(self._on.get(replica_id, ()))
        replica.draining = True
        replica.refresh(self._clock())
        return len(replica.leases)

    def load(self, replica_id: str, report: LoadReport) -> list[Reply]:
        """Learn from a step; waiting requests that now have room get their leases."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return []
        replica.report(report, self._clock())
        return self._release(replica.info.model)

    def canaries(self) -> list[str]:
        """Replicas that are to make a canary token now; `canary` tells how it went."""
        now = self._clock()
        due = [r for r in self._replicas.values() if r.canary_due(now, self.config.canary_every)]
        for replica in due:
            replica.canary.send(now)
        return [replica.info.id for replica in due]

    def canary(self, replica_id: str, *, well: bool) -> list[Reply]:
        """The canary of `replica_id` came back; one that failed gets no leases until another one is well."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return []
        replica.canary_ended(self._clock(), well=well)
        return self._release(replica.info.model)

    def tick(self) -> list[Reply]:
        """To be called about ten times a second: what follows from time alone."""
        now = self._clock()
        replies: list[Reply] = []
        for client, since in list(self._gone.items()):
            if now - since >= self.config.orphan_grace:
                del self._gone[client]
                self._forget(client, keep=set(), now=now)
        for fleet in self._fleets.values():
            speed = fleet.speed(self.config.seed_speed)
            for replica in fleet.replicas:
                replica.fleet = speed
                replica.recovering = now < self._recovered_at
                replica.watch(now, self.config.suspect_after)
            if not fleet.replicas and len(fleet.queue):
                replies += self._expire(fleet, now)
        return replies + self._release_all()

    def reload(self, qos: QosConfig) -> list[Reply]:
        """`qos` orders what waits from now on. What was served stays known, unless QoS was or will be switched off."""
        self._qos = qos
        for fleet in self._fleets.values():
            if isinstance(fleet.queue, FairQueue) and qos.enabled:
                fleet.queue.replace(qos)
                continue
            waiting, fleet.queue = list(fleet.queue), self._room()
            for lease_id, lease in self._leases.items():
                if lease.request.model == fleet.model:
                    fleet.queue.adopt(lease_id, Waiting(lease.request, lease.client, lease.arrived, lease.granted))
            for w in waiting:
                fleet.queue.push(w.request.lease_id, w)
        return self._release_all()

    # for status, metrics and tests

    @property
    def waiting(self) -> int:
        """Requests without a lease."""
        return sum(len(fleet.queue) for fleet in self._fleets.values())

    @property
    def waiting_by_model(self) -> tuple[tuple[str, int], ...]:
        """The same, apart."""
        return tuple((model, len(fleet.queue)) for model, fleet in self._fleets.items())

    def rows(self) -> tuple[ReplicaRow, ...]:
        """The replica table."""
        now = self._clock()
        return tuple(r.row(now) for r in self._replicas.values())

    def ledger(self) -> Ledger:
        """The books, counted anew; `balanced` must hold at any time."""
        slots = {r.info.id: sum(x.request.choices for x in r.leases.values()) for r in self._replicas.values()}
        wrong = [i for i, n in slots.items() if n != self._replicas[i].slots]
        on = {lease_id for leases in self._on.values() for lease_id in leases}
        wrong += sorted(on ^ set(self._leases))
        return self._ends.ledger(held=len(self._leases), waiting=self.waiting, mismatches=tuple(wrong))

    # inside

    def _fleet(self, model: str) -> Fleet:
        fleet = self._fleets.get(model)
        if fleet is None:
            fleet = self._fleets[model] = Fleet(model, self._room(), self.config.decode_margin)
        return fleet

    def _room(self) -> Room[Waiting]:
        qos = self._qos
        if qos is None or not qos.enabled:
            return WaitingQueue(self._ordering, self.config.max_waiting)
        limits = Limits(step=_FLOOR_BOUND)
        return FairQueue(qos, limits, describe=self._facts, clock=self._clock, limit=self.config.max_waiting)

    def _facts(self, waiting: Waiting) -> Facts:
        """What the order depends on; the work is what is expected of it now."""
        request = waiting.request
        output = round(self._demand(request).output) * request.choices
        prefill = 0 if request.resumed_tokens else request.prompt_tokens  # a replay's was charged before
        units = self._prices.units(prefill, output, _kv_read(request, output))
        return Facts(request.owner, request.tier, units, waiting.arrived, request.accepted)

    def _charge(self, request: Acquire, settled: Settle) -> None:
        reads = _kv_read(request, settled.decode_tokens)
        queue = self._fleet(request.model).queue
        queue.ended(request.lease_id, settled.prefill_tokens, settled.decode_tokens, reads)

    def _refusal(self, waiting: Waiting, fleet: Fleet) -> Refused | None:
        request, queue = waiting.request, fleet.queue
        text = None if request.accepted else queue.refusal(waiting)
        if text is None:
            return fleet.never(request)
        retry_after = fleet.retry_after(self._hold_seconds, queue.ahead(waiting))
        return Refused(request.lease_id, Refusal.OVERLOADED, f"{text} for {request.model}", retry_after)

    def _make_place(self, waiting: Waiting, fleet: Fleet) -> None:
        out = fleet.queue.shed(waiting)
        if out is not None:
            self._ends.refused += 1
            retry_after = fleet.retry_after(self._hold_seconds, fleet.queue.ahead(out))
            text = f"requests of higher tiers took all places to wait for {fleet.model}"
            self._shed.append(Reply(out.client, Refused(out.request.lease_id, Refusal.OVERLOADED, text, retry_after)))

    def _blocks(self, request: Acquire, info: ReplicaInfo) -> int:
        return min(blocks_needed(request, info.block_size, self.config.decode_margin), info.num_blocks)

    def _demand(self, request: Acquire) -> Demand:
        output = self._outputs.expected(request.owner, request.route, request.max_tokens)
        left = max(output - request.resumed_tokens / request.choices, 1.0)
        return Demand(request.prompt_tokens + request.resumed_tokens, left, request.choices)

    def _try(self, waiting: Waiting, fleet: Fleet, now: float) -> Granted | None:
        """The lease of `waiting`, if a replica has room. It is still in the queue then."""
        request = waiting.request
        demand = self._demand(request)
        insist = now - waiting.queued >= self.config.exclusion_grace
        replica = fleet.place(request, demand, self._strategy, insist=insist)
        if replica is None:
            return None
        expected = replica.expected(demand)
        lease = Lease(request, waiting.client, replica.info.id, waiting.arrived, now)
        lease.blocks = self._blocks(request, replica.info)
        lease.concurrent = replica.slots + request.choices
        self._hold(lease, replica, demand.prefill, now)
        return Granted(request.lease_id, replica.info, expected, now - waiting.arrived)

    def _hold(self, lease: Lease, replica: Replica, prefill: int, now: float) -> None:
        self._leases[lease.request.lease_id] = lease
        replica.add(lease.request.lease_id, lease, prefill, now)

    def _drop(self, lease_id: str, now: float) -> None:
        lease = self._leases.pop(lease_id)
        self._fleet(lease.request.model).queue.ended(lease_id)  # without a charge, unless it was settled
        replica = self._replicas.get(lease.replica_id)
        if replica is not None:
            replica.remove(lease_id, now)
            return
        rest = self._on[lease.replica_id]
        del rest[lease_id]
        if not rest:
            del self._on[lease.replica_id]

    def _forget(self, client: str, keep: set[str], now: float) -> None:
        for lease_id in [i for i, lease in self._leases.items() if lease.client == client and i not in keep]:
            self._drop(lease_id, now)
            self._ends.cancelled += 1
        self._forget_waiting(client)

    def _forget_waiting(self, client: str) -> None:
        for fleet in self._fleets.values():
            for waiting in [w for w in fleet.queue if w.client == client]:
                fleet.queue.remove(waiting.request.lease_id)
                self._ends.cancelled += 1

    def _release(self, model: str) -> list[Reply]:
        """Leases for as many waiting requests as there is room for, in order."""
        fleet = self._fleets.get(model)
        if fleet is None or not fleet.queue:
            return []
        queue, now = fleet.queue, self._clock()
        replies: list[Reply] = []
        aside = 0
        while (head := queue.peek()) is not None:
            granted = self._try(head, fleet, now)
            if granted is not None:
                replies.append(Reply(head.client, granted))
                queue.granted(head.request.lease_id)
            elif head.request.excluded and aside < _LOOK_PAST:
                queue.set_aside(head.request.lease_id)
                aside += 1
            else:
                break
        if aside:
            queue.put_back()
        return replies

    def _release_all(self) -> list[Reply]:
        return [reply for model in list(self._fleets) for reply in self._release(model)]

    def _expire(self, fleet: Fleet, now: float) -> list[Reply]:
        replies = []
        for w in list(fleet.queue):
            grace = self.config.replay_grace if w.request.accepted else self.config.replica_grace
            if now - max(fleet.empty_since, w.queued) >= grace:
                fleet.queue.remove(w.request.lease_id)
                self._ends.refused += 1
                text = f"no replica of {fleet.model} came up in {grace:g} s"
                replies.append(Reply(w.client, Refused(w.request.lease_id, Refusal.NO_REPLICA, text, grace)))
        return replies


def _kv_read(request: Acquire, decodes: int) -> int:
    """Tokens that `decodes` tokens of the answer, over all choices, read: each all before it."""
    each = decodes / request.choices
    return round(decodes * (request.prompt_tokens + request.resumed_tokens / request.choices + each / 2))
