"""The dispatcher: a plain object without I/O. What it has to tell others comes back from the calls as replies.

Every request that comes in ends exactly once: settled, cancelled, lost or refused; `ledger` proves it. The parts:
`leases` (what stands, and the books), `registry` (fleets and replicas), `rooms` (where requests wait, and charges),
`granting` (who gets a lease, and where).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from random import Random
from typing import Any

from router.dispatch.activity import Activity
from router.dispatch.config import DispatcherConfig
from router.dispatch.fleet import Waiting
from router.dispatch.granting import Expectations, Granting, Reply
from router.dispatch.lease import (
    Acquire,
    Granted,
    LeaseLost,
    Outcome,
    Refused,
    ReplicaRow,
    Reregister,
    Settle,
    TierRow,
    WorkRow,
)
from router.dispatch.leases import Leases
from router.dispatch.ledger import Ledger
from router.dispatch.registry import Registry
from router.dispatch.rooms import Rooms, charge
from router.dispatch.scaling import FleetLoad
from router.dispatch.stories import Stories
from router.dispatch.strategies import make_strategy
from router.dispatch.table import Lease
from router.qos.config import QosConfig
from router.qos.fair_queue import FairQueue
from router.qos.queue import Ordering
from router.qos.steps import engine_limits
from workers.api.ordering import ServiceReport, ServiceSync
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo

__all__ = ["Dispatcher", "DispatcherConfig", "Reply"]


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
        self._expectations = Expectations()
        self._rooms = Rooms(
            config.qos,
            config.own_qos,
            output=self._expectations.output,
            clock=clock,
            max_waiting=config.max_waiting,
            ordering=ordering,
        )
        self._leases = Leases()
        self.stories = Stories()
        self._registry = Registry(config, self._leases, make_room=self._rooms.make, started=clock())
        self._granting = Granting(
            config,
            self._registry,
            self._leases,
            self._expectations,
            strategy=make_strategy(config.strategy, rng),
            clock=clock,
            stories=self.stories,
            home=self._rooms.home,
        )
        self._gone: dict[str, float] = {}  # clients away since

    # requests

    def acquire(self, client: str, request: Acquire) -> Granted | Refused | None:
        """A lease now, a refusal, or None: it waits, and the answer comes out of a later call.

        An id that is known already is not taken twice.
        """
        held = self._leases.get(request.lease_id)
        if held is not None:
            replica = self._registry.get(held.replica_id)
            if replica is None:
                return None
            return Granted(request.lease_id, replica.info, 0.0, self._clock() - held.arrived)
        if any(request.lease_id in fleet.queue for fleet in self._registry.fleets):
            return None
        return self._granting.admit(client, request)

    def shed(self) -> list[Reply]:
        """Refusals of requests that `acquire` took out of the queue for one of a higher tier; each comes once."""
        return self._granting.shed()

    def settle(self, settled: Settle) -> list[Reply]:
        """The lease's room is free again and its work is learned from. A lease that has ended already is left alone."""
        lease = self._leases.get(settled.lease_id)
        if lease is None:
            self._leases.ends.late += 1
            return []
        now, request = self._clock(), lease.request
        replica = self._registry.get(lease.replica_id)
        if settled.outcome is Outcome.COMPLETED:
            self._expectations.observe(request, settled.output_tokens, now - lease.granted)
            if replica is not None and not lease.is_head:
                replica.observe_lease(lease, now)
                if replica.info.url:
                    replica.observe_answer(lease, settled, now)
                if settled.first_seconds > 0.0 and lease.first > 0.0:
                    replica.observe_first(lease, settled.first_seconds)
        elif settled.outcome is Outcome.LOST and replica is not None:
            replica.suspect = True
        self.stories.settled(settled, self._rooms.units(request, settled), now)
        by_step = replica is not None and replica.tiered
        charge(self._registry.fleet(request.model).queue, request, settled, charged=by_step)
        self._drop(lease, now)
        self._leases.ends.settled += 1
        return self._release(request.model)

    def cancel(self, lease_id: str) -> list[Reply]:
        """The request is forgotten, whether it waits or holds a lease; unknown ids are left alone."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._drop(lease, self._clock())
            self._leases.ends.cancelled += 1
            return self._release(lease.request.model)
        for fleet in self._registry.fleets:
            if fleet.queue.remove(lease_id) is not None:
                self._leases.ends.cancelled += 1
                self.stories.dropped(lease_id, "cancelled", self._clock())
                return self._granting.release(fleet)  # it may have been the head that blocked others
        self._leases.ends.late += 1
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
            self._leases.ends.acquired += 1
            lease = Lease(h.request, client, h.replica_id, now - max(h.request.age, 0.0), now)
            queue = self._registry.fleet(h.request.model).queue
            waiting = Waiting(h.request, client, lease.arrived, now)
            queue.adopt(lease_id, waiting)
            lease.seat = queue.seat(waiting)
            replica = self._registry.get(h.replica_id)
            if replica is not None:
                lease.blocks = self._registry.blocks(h.request, replica.info)
            self._leases.hold(lease, replica, 0, now)
        for request in message.waiting:
            answer = self.acquire(client, request)
            if answer is not None:
                replies.append(Reply(client, answer))
        return replies + self._granting.release_all()

    def client_gone(self, client: str) -> list[Reply]:
        """Its waiting requests are cancelled; its leases stand for `orphan_grace` seconds, unless it comes back."""
        self._gone[client] = self._clock()
        self._forget_waiting(client)
        return self._granting.release_all()

    # replicas

    def replica_up(self, info: ReplicaInfo, speed: float | None = None) -> list[Reply]:
        """`info` gets leases from now on. `speed` (prefill tokens a second) is believed until it was measured."""
        if self._registry.get(info.id) is not None:
            return []
        self._registry.add(info, speed, self._clock())
        return self._release(info.model)

    def replica_down(self, replica_id: str, reason: str = "removed", *, died: bool = True) -> list[Reply]:
        """`replica_id` is no more; each lease on it is reported lost, once. Unknown ids only lose what was on them."""
        gone = self._registry.get(replica_id)
        if gone is not None:
            self._registry.fleet(gone.info.model).served.gone(replica_id)
        self._registry.remove(replica_id, self._clock())
        replies = []
        for lease in self._leases.drop_all_on(replica_id):
            lease_id = lease.request.lease_id
            queue = self._registry.fleet(lease.request.model).queue
            queue.ended(lease_id, charged=gone is not None and gone.tiered)
            self._leases.ends.lost += 1
            self.stories.dropped(lease_id, "lost", self._clock())
            replies.append(Reply(lease.client, LeaseLost(lease_id, replica_id, reason, died)))
        return replies

    def drain(self, replica_id: str) -> int:
        """`replica_id` gets no new leases; how many it still has of clients that are here. Unknown ids have none."""
        self._registry.drain(replica_id, self._clock())
        return sum(lease.client not in self._gone for lease in self._leases.held_on(replica_id))

    def expect(self, model: str, seconds: float) -> None:
        """A replica of `model` is about to come: for so many seconds nobody is refused because there is none."""
        self._registry.fleet(model).expected_until = self._clock() + seconds

    def fleet_load(self, model: str) -> FleetLoad:
        """How busy all replicas of `model` are together."""
        fleet = self._registry.fleet(model)
        return fleet.load(self._expectations.hold_seconds, self._clock())

    def load(self, replica_id: str, report: LoadReport) -> list[Reply]:
        """Learn from a step; waiting requests that now have room get their leases."""
        replica = self._registry.get(replica_id)
        if replica is None:
            return []
        replica.report(report, self._clock())
        return self._release(replica.info.model)

    def cache(self, replica_id: str, news: CacheNews) -> None:
        """What the prefix cache of `replica_id` gained and lost."""
        replica = self._registry.get(replica_id)
        if replica is not None:
            replica.prefixes.take(news)

    def service(self, replica_id: str, report: ServiceReport) -> list[Reply]:
        """What `replica_id` executed is charged; it is one whose steps the policy orders."""
        replica = self._registry.get(replica_id)
        if replica is None:
            return []
        fleet = self._registry.fleet(replica.info.model)
        if not isinstance(fleet.queue, FairQueue):
            fleet.served.note(replica_id, report)
            return []
        if not fleet.served.report(replica_id, report, fleet.queue):
            return []
        replica.tiered, now = True, self._clock()
        for row in report.accounts:
            replica.waits(row.key, row.waiting, now)
        return self._granting.release(fleet) + self._granting.release_heads(fleet)

    def service_syncs(self) -> list[tuple[str, ServiceSync]]:
        """By replica, what it does not know yet of the cluster's service."""
        return [
            sync
            for fleet in self._registry.fleets
            if isinstance(fleet.queue, FairQueue)
            for sync in fleet.served.syncs(fleet.queue)
        ]

    def canaries(self) -> list[str]:
        """Replicas that are to make a canary token now; `canary` tells how it went."""
        return self._registry.canaries(self._clock())

    def canary(self, replica_id: str, *, well: bool) -> list[Reply]:
        """The canary of `replica_id` came back; one that failed gets no leases until another one is well."""
        replica = self._registry.get(replica_id)
        if replica is None:
            return []
        replica.canary_ended(self._clock(), well=well)
        return self._release(replica.info.model)

    def hopeless(self, replica_id: str) -> str | None:
        """Why `replica_id` is to be replaced; None while it may come to itself, and of unknown ids."""
        replica = self._registry.get(replica_id)
        if replica is None:
            return None
        return replica.hopeless(self._clock(), self.config.replace_failures, self.config.replace_after)

    def tick(self) -> list[Reply]:
        """To be called about ten times a second: what follows from time alone."""
        now = self._clock()
        for client, since in list(self._gone.items()):
            if now - since >= self.config.orphan_grace:
                del self._gone[client]
                self._forget(client, keep=set(), now=now)
        self._registry.watch(now)
        self._granting.look()
        moved = [reply for replica_id in self._registry.hung(now) for reply in self._move_from(replica_id, now)]
        return moved + self._granting.expire() + self._granting.release_all()

    def reload(self, qos: QosConfig, model: str | None = None) -> list[Reply]:
        """`qos` orders what waits from now on: for `model`, which has one of its own, or for all that have none.

        What was served stays known, unless QoS was or will be switched off.
        """
        if model is None:
            self._rooms.qos = qos
        else:
            self._rooms.own[model] = qos
        for fleet in self._registry.fleets:
            if self._rooms.qos_of(fleet.model) is not qos:
                continue
            leased = [
                Waiting(lease.request, lease.client, lease.arrived, lease.granted)
                for lease in self._leases.by_id.values()
                if lease.request.model == fleet.model
            ]
            fleet.queue = self._rooms.replaced(fleet.model, fleet.queue, leased)
            if not qos.enabled:
                for replica in fleet.replicas:
                    replica.tiered = False  # nobody yields for anybody, and no head waits there any more
        return self._granting.release_all()

    # for status, metrics and tests

    @property
    def qos(self) -> QosConfig | None:
        """What orders what waits for models without their own; None: first come, first served."""
        return self._rooms.qos

    @property
    def waiting(self) -> int:
        """Requests without a lease."""
        return sum(len(fleet.queue) for fleet in self._registry.fleets)

    @property
    def waiting_by_model(self) -> tuple[tuple[str, int], ...]:
        """The same, apart."""
        return tuple((fleet.model, len(fleet.queue)) for fleet in self._registry.fleets)

    def story(self, owner: str | None, request_id: str) -> dict[str, Any] | None:
        """What became of a request of `owner` (None: of anybody), and where it stands if it waits; None: unknown."""
        story = self.stories.tell(owner, request_id)
        if story is None:
            return None
        for lease_id in self.stories.waiting(owner, request_id):
            for fleet in self._registry.fleets:
                if lease_id in fleet.queue:
                    outlook = self._granting.outlook(fleet, lease_id)
                    if outlook.position > story.get("position", 0):  # of several prompts, the last one's
                        story["position"] = outlook.position
                        story["wait_seconds"] = [round(s, 2) for s in (outlook.low, outlook.middle, outlook.high)]
        return story

    def activity(self) -> Generator[None, None, dict[str, Any]]:
        """What happens now, for an operator, in slices: see `router.slices`."""
        return self._look().of_all()

    def standing(self, owner: str, tier: str) -> dict[str, Any]:
        """How an owner stands whose key says `tier`."""
        return self._look().of_owner(owner, tier)

    def tiers(self) -> tuple[TierRow, ...]:
        """Every tier of every queue, with the gaps between its accounts: this looks after them."""
        for fleet in self._registry.fleets:
            if isinstance(fleet.queue, FairQueue):
                prices = fleet.queue.policy.prices
                ordered = (engine_limits(r.info, prices) for r in fleet.replicas if r.tiered)
                fleet.queue.steps = sum(limits.spread for limits in ordered)
        return tuple(
            TierRow(
                fleet.model,
                state.tier,
                state.waiting,
                state.oldest_seconds,
                state.outlook.middle,
                state.reading.gap,
                state.reading.bound,
                state.reading.share_error,
                state.reading.violations,
            )
            for fleet in self._registry.fleets
            for state in fleet.queue.tiers()
        )

    def work(self) -> tuple[WorkRow, ...]:
        """What was executed where quotas hold, and for which tier; the rows of a model sum to all of it."""
        return tuple(
            WorkRow(fleet.model, tier, kind, tokens)
            for fleet in self._registry.fleets
            if isinstance(fleet.queue, FairQueue)
            for (tier, kind), tokens in fleet.queue.policy.ledger.by_tier().items()
        )

    def rows(self) -> tuple[ReplicaRow, ...]:
        """The replica table."""
        now = self._clock()
        return tuple(r.row(now) for r in self._registry.replicas.values())

    def ledger(self) -> Ledger:
        """The books, counted anew; `balanced` must hold at any time."""
        return self._leases.ledger(self._registry.replicas.values(), self.waiting)

    # inside

    def _look(self) -> Activity:
        return Activity(self._registry.fleets, self._leases, self._rooms, self.stories, self._clock())

    def _release(self, model: str) -> list[Reply]:
        return self._granting.release(self._registry.by_model.get(model))

    def _drop(self, lease: Lease, now: float, end: str = "cancelled") -> None:
        lease_id, replica = lease.request.lease_id, self._registry.get(lease.replica_id)
        queue = self._registry.fleet(lease.request.model).queue
        queue.ended(lease_id, charged=replica is not None and replica.tiered)  # no charge here, unless it was settled
        self.stories.dropped(lease_id, end, now)
        self._leases.drop(lease_id, replica, now)

    def _move_from(self, replica_id: str, now: float) -> list[Reply]:
        """The leases on a replica that hangs are lost there; it stays registered, and may come to itself."""
        replies = []
        for lease_id, lease in list(self._leases.on(replica_id).items()):
            self._drop(lease, now, "lost")
            self._leases.ends.lost += 1
            replies.append(Reply(lease.client, LeaseLost(lease_id, replica_id, "it makes no step", died=True)))
        return replies

    def _forget(self, client: str, keep: set[str], now: float) -> None:
        for lease_id in self._leases.of(client):
            if lease_id not in keep:
                self._drop(self._leases.by_id[lease_id], now)
                self._leases.ends.cancelled += 1
        self._forget_waiting(client)

    def _forget_waiting(self, client: str) -> None:
        for fleet in self._registry.fleets:
            for waiting in [w for w in fleet.queue if w.client == client]:
                fleet.queue.remove(waiting.request.lease_id)
                self._leases.ends.cancelled += 1
                self.stories.dropped(waiting.request.lease_id, "cancelled", self._clock())
