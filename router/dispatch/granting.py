"""Who gets a lease, and where: admission to the waiting room, and the grants as replicas have room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.dispatch.config import DispatcherConfig
from router.dispatch.fleet import Fleet, Waiting
from router.dispatch.latency import OutputLengths
from router.dispatch.lease import Acquire, Granted, LeaseLost, Refusal, Refused, ReplicaState
from router.dispatch.leases import Leases
from router.dispatch.registry import Registry
from router.dispatch.stories import MOST_CANDIDATES, Candidate, Stories
from router.dispatch.strategies import Strategy
from router.dispatch.table import Demand, Lease, Replica
from router.qos.outlook import Outlook

_MOST_FRONTS = 32  # accounts, the least served first, that are looked at for a head in an engine
_LOOKED_AT = 4000  # waiting requests compared in one look
_LOOK_PAST = 32  # waiting requests that only their exclusions hold back are passed over, this many at once


@dataclass(frozen=True, slots=True)
class Reply:
    """`message` is for the ingress called `client`."""

    client: str
    message: Granted | Refused | LeaseLost


class Expectations:
    """What requests will probably need, learned from those that have ended."""

    def __init__(self) -> None:
        self._outputs = OutputLengths()
        self.hold_seconds = 2.0  # what a lease lasts

    def output(self, request: Acquire) -> float:
        """Tokens that are still to come, of one choice."""
        output = self._outputs.expected(request.owner, request.route, request.max_tokens)
        return max(output - request.resumed_tokens / request.choices, 1.0)

    def demand(self, request: Acquire, now: float) -> Demand:
        """Of `request`, which asks now."""
        known = request.prompt_tokens + request.resumed_tokens
        return Demand(known, self.output(request), request.choices, request.prompt, now)

    def observe(self, request: Acquire, output_tokens: int, seconds: float) -> None:
        """The lease of `request` was completed after `seconds`; it emitted `output_tokens` over all choices."""
        if not request.resumed_tokens:
            self._outputs.observe(request.owner, request.route, output_tokens / request.choices)
        self.hold_seconds += 0.05 * (seconds - self.hold_seconds)


class Granting:
    """Takes requests in and gives leases out, in the order of each fleet's room, by `strategy`."""

    def __init__(
        self,
        config: DispatcherConfig,
        registry: Registry,
        leases: Leases,
        expectations: Expectations,
        *,
        strategy: Strategy,
        clock: Callable[[], float],
        stories: Stories,
        home: Callable[[Acquire], tuple[str, str]],
    ) -> None:
        self._config, self._registry, self._leases = config, registry, leases
        self._expectations, self._strategy, self._clock = expectations, strategy, clock
        self._stories, self._home = stories, home
        self._shed: list[Reply] = []

    def admit(self, client: str, request: Acquire) -> Granted | Refused | None:
        """A lease now, a refusal, or None: the request, which is new, waits."""
        ends, now = self._leases.ends, self._clock()
        ends.acquired += 1
        if not request.accepted and not self._registry.knows(request.model):
            ends.refused += 1
            return Refused(request.lease_id, Refusal.UNKNOWN_MODEL, request.model)
        fleet = self._registry.fleet(request.model)
        waiting = Waiting(request, client, now - max(request.age, 0.0), now)
        self._stories.asked(client, request, *self._home(request), waiting.arrived)
        refusal = self._refusal(waiting, fleet)
        if refusal is not None:
            ends.refused += 1
            self._stories.refused(refusal, now)
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
        """Refusals of requests that `admit` took out for one of a higher tier; each comes once."""
        shed, self._shed = self._shed, []
        return shed

    def release(self, fleet: Fleet | None) -> list[Reply]:
        """Leases for as many waiting requests as there is room for, in order."""
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

    def release_heads(self, fleet: Fleet) -> list[Reply]:
        """Leases to wait in the engines, one for each account and replica: the policy there weighs who runs against
        who waits, which it can only where it knows them.
        """
        now = self._clock()
        replies: list[Reply] = []
        for waiting in fleet.queue.fronts(_MOST_FRONTS):
            granted = self._try(waiting, fleet, now, as_head=True)
            if granted is not None:
                replies.append(Reply(waiting.client, granted))
                fleet.queue.granted(waiting.request.lease_id)
        return replies

    def release_all(self) -> list[Reply]:
        """The same for all fleets."""
        return [reply for fleet in list(self._registry.fleets) for reply in self.release(fleet)]

    def expire(self) -> list[Reply]:
        """Refusals of those that have waited for a first replica of their model for too long."""
        now, replies = self._clock(), []
        for fleet in self._registry.fleets:
            if not fleet.queue or any(not (r.info.url and r.suspect) for r in fleet.replicas):
                continue  # a foreign node that does not answer is nobody to wait for
            if now < fleet.expected_until:
                continue
            for w in list(fleet.queue):
                grace = self._config.replay_grace if w.request.accepted else self._config.replica_grace
                if now - max(fleet.empty_since, w.queued) >= grace:
                    fleet.queue.remove(w.request.lease_id)
                    self._leases.ends.refused += 1
                    text = f"no replica of {fleet.model} came up in {grace:g} s"
                    refused = Refused(w.request.lease_id, Refusal.NO_REPLICA, text, grace)
                    self._stories.refused(refused, now)
                    replies.append(Reply(w.client, refused))
        return replies

    def look(self) -> None:
        """Some of those that wait are told where they stand, for their stories; it takes a millisecond or two."""
        now, left = self._clock(), _LOOKED_AT
        while left > 0 and (lease_id := self._stories.due(now)) is not None:
            for fleet in self._registry.fleets:
                if lease_id in fleet.queue:
                    left -= len(fleet.queue)
                    self._stories.stands(lease_id, self.outlook(fleet, lease_id).position, now)

    def outlook(self, fleet: Fleet, lease_id: str) -> Outlook:
        """Where `lease_id`, which waits, stands. Raises KeyError."""
        return fleet.queue.outlook(lease_id, fleet.pace(self._expectations.hold_seconds))

    def _refusal(self, waiting: Waiting, fleet: Fleet) -> Refused | None:
        request, queue = waiting.request, fleet.queue
        text = None if request.accepted else queue.refusal(waiting)
        if text is None:
            return fleet.never(request)
        return self._overloaded(waiting, fleet, f"{text} for {request.model}")

    def _overloaded(self, waiting: Waiting, fleet: Fleet, text: str) -> Refused:
        hold, queue = self._expectations.hold_seconds, fleet.queue
        outlook = queue.prospect(waiting, fleet.pace(hold))
        text += f"; it would be number {outlook.position}, and wait {outlook.low:.0f} to {outlook.high:.0f} s"
        return Refused(
            waiting.request.lease_id,
            Refusal.OVERLOADED,
            text,
            fleet.retry_after(hold, queue.ahead(waiting)),
            outlook.position,
            (outlook.low, outlook.middle, outlook.high),
        )

    def _make_place(self, waiting: Waiting, fleet: Fleet) -> None:
        out = fleet.queue.shed(waiting)
        if out is not None:
            self._leases.ends.refused += 1
            text = f"requests of higher tiers took all places to wait for {fleet.model}"
            refused = self._overloaded(out, fleet, text)
            self._stories.refused(refused, self._clock())
            self._shed.append(Reply(out.client, refused))

    def _try(self, waiting: Waiting, fleet: Fleet, now: float, *, as_head: bool = False) -> Granted | None:
        """The lease of `waiting`, if a replica has room, or takes it as the head of its account's queue. It is still in
        the waiting room then.
        """
        request = waiting.request
        demand = self._expectations.demand(request, now)
        insist = now - waiting.queued >= self._config.exclusion_grace
        seat = fleet.queue.seat(waiting)
        if as_head:
            replica = fleet.place_head(request, demand, self._strategy, seat.account)
        else:
            replica = fleet.place(request, demand, self._strategy, insist=insist, rank=seat.rank)
        if replica is None:
            return None
        expected, first, uncached = replica.expected(demand), replica.expected_first(demand), replica.uncached(demand)
        if as_head:
            first = 0.0  # how long it waits in the engine is not predicted, and teaches nothing
        lease = Lease(request, waiting.client, replica.info.id, waiting.arrived, now)
        lease.seat, lease.is_head = seat, as_head
        lease.blocks = self._registry.blocks(request, replica.info)
        lease.concurrent = replica.slots + request.choices
        lease.first = first - replica.lag if first and replica.model.known else 0.0
        cached = demand.prefill - uncached
        since = fleet.queue.since(request.lease_id)
        waited = now - (waiting.arrived if since is None else since)
        granted = Granted(request.lease_id, replica.info, expected, waited, first, cached)
        if request.name:
            self._stories.granted(granted, self._candidates(fleet, replica, request, demand), now)
        self._leases.hold(lease, replica, uncached, now)
        return granted

    def _candidates(self, fleet: Fleet, chosen: Replica, request: Acquire, demand: Demand) -> list[Candidate]:
        """The chosen one and some others, as they stood before it."""
        others = [r for r in fleet.replicas[:MOST_CANDIDATES] if r is not chosen][: MOST_CANDIDATES - 1]
        found = []
        for r in (chosen, *others):
            blocks = self._registry.blocks(request, r.info)
            if r is chosen:
                state = "chosen"
            elif r.state is not ReplicaState.READY:
                state = str(r.state)
            elif r.info.id in request.excluded:
                state = "excluded"
            else:
                has_room = r.free_slots >= request.choices and r.free_blocks >= blocks
                state = "possible" if has_room else "full"
            cached = demand.prefill - r.uncached(demand)
            found.append(Candidate(r.info.id, state, r.expected(demand), r.expected_first(demand), cached))
        return found
