"""What happens now: who waits, who is served where and why, and who was done lately. For pages that ask once a second.

It is read from what the dispatcher keeps anyway, when somebody asks; whatever could be long is cut. What grows with
users is read in slices of well under a millisecond, between which requests go on: so the parts of one look may be of
different moments.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from router.dispatch.fleet import Fleet, Waiting
from router.dispatch.lease import Acquire
from router.dispatch.leases import Leases
from router.dispatch.rooms import Rooms
from router.dispatch.stories import Stories
from router.dispatch.table import Lease
from router.qos.fair_queue import FairQueue

MOST_USERS = 50
MOST_SERVED = 24
MOST_WAITING = 12  # of each model
MOST_ENDED = 24
SLICE = 100  # users
_SERVED_AT_ONCE = 8
_NO_TIER = 1 << 30

_Name = TypeVar("_Name")
_User = tuple[str, str, str]  # model, user, tier
_Ranked = tuple[int, int, _User, tuple[int, int]]  # rank of the tier, less what waits and runs, and how much of each


class _Users:
    """The first of many users, the higher tiers first, then who has most; and what all have, by model and tier."""

    def __init__(self, ranks: dict[str, dict[str, int]]) -> None:
        self._ranks = ranks
        self._tiers: dict[tuple[str, str], tuple[int, int]] = {}
        self._new: list[_Ranked] = []
        self.first: list[_Ranked] = []
        self.count = 0

    def add(self, user: _User, waiting: int, running: int) -> None:
        """One more user."""
        model, _, tier = user
        self.count += 1
        self._new.append((self._rank(model, tier), -waiting - running, user, (waiting, running)))
        before = self._tiers.get((model, tier), (0, 0))
        self._tiers[model, tier] = before[0] + waiting, before[1] + running

    def cut(self) -> None:
        """What was added is among `first`, or is forgotten."""
        self.first = heapq.nsmallest(MOST_USERS, self.first + self._new)
        self._new.clear()

    def by_tier(self) -> list[dict[str, Any]]:
        """How many wait and run in each tier, the higher ones first."""
        tiers = sorted(self._tiers.items(), key=lambda item: self._rank(*item[0]))
        return [{"model": m, "tier": t, "waiting": w, "running": r} for (m, t), (w, r) in tiers]

    def _rank(self, model: str, tier: str) -> int:
        return self._ranks.get(model, {}).get(tier, _NO_TIER)


class Activity:
    """At `now`, in the dispatcher's seconds."""

    def __init__(self, fleets: Iterable[Fleet], leases: Leases, rooms: Rooms, stories: Stories, now: float) -> None:
        self._fleets, self._leases, self._rooms = list(fleets), leases, rooms
        self._stories, self._now = stories, now
        self._heads: set[str] = set()  # leased, but they wait in an engine for their account's turn

    def of_all(self) -> Generator[None, None, dict[str, Any]]:
        """For an operator. `waiting` are those that come next: where there are quotas, the first of each account."""
        for fleet in self._fleets:
            for number, replica in enumerate(list(fleet.replicas)):
                self._heads.update(lease_id for lease_id, _ in replica.heads.values())
                if number % SLICE == SLICE - 1:
                    yield
        yield
        users = yield from self._users()
        latest = list(islice(reversed(self._leases.by_id.values()), MOST_SERVED))
        more = len(self._leases) - len(latest)
        served: list[dict[str, Any]] = []
        for at in range(0, len(latest), _SERVED_AT_ONCE):
            served += [self._served(lease) for lease in latest[at : at + _SERVED_AT_ONCE]]
            yield
        waiting = [self._waiting(w) for fleet in self._fleets for w in _next(fleet)]
        yield
        return {
            "tiers": users.by_tier(),
            "users": [self._user(user, *count) for _, _, user, count in users.first],
            "more_users": users.count - len(users.first),
            "served": served,
            "more_served": more,
            "waiting": waiting,
            "ended": self._stories.ended_lately(MOST_ENDED, self._now),
        }

    def of_owner(self, owner: str, tier: str) -> dict[str, Any]:
        """How `owner`, whose API key says `tier`, stands at each model."""
        running: Counter[str] = Counter()
        for (model, _), count in self._leases.by_owner.get(owner, {}).items():
            running[model] += count
        found = {}
        for fleet in self._fleets:
            account = self._rooms.account(fleet.model, owner, tier)
            heads = 0
            for replica in fleet.replicas if account is not None and running[fleet.model] else ():
                lease = self._leases.get(replica.heads.get(account.key, ("",))[0]) if account is not None else None
                heads += lease is not None and lease.request.owner == owner
            found[fleet.model] = {
                "tier": tier if account is None else account.tier.name,
                "account": "" if account is None else account.id,
                "waiting": heads + fleet.queue.waiting_of(owner),
                "running": running[fleet.model] - heads,
            }
        return {"models": found}

    # inside

    def _users(self) -> Generator[None, None, _Users]:
        """Who waits or runs. Nothing is made that grows with their number: to free it would take long, too."""
        users = _Users({fleet.model: self._ranks(fleet.model) for fleet in self._fleets})
        heads = Counter(
            (lease.request.model, lease.request.owner, self._rooms.home(lease.request)[0])
            for lease in map(self._leases.get, self._heads)
            if lease is not None
        )
        seen: dict[str, set[tuple[str, str]]] = {}
        for fleet in self._fleets:
            waiting, model = fleet.queue.waiting_by_user, fleet.model
            those = seen[model] = set()
            for part in _parts(waiting):
                those.update(part)
                for tier, user in part:
                    head = heads[model, user, tier]
                    running = self._running(user).get((model, tier), 0) - head
                    users.add((model, user, tier), waiting.get((tier, user), 0) + head, running)
                users.cut()
                yield
        for owners in _parts(self._leases.by_owner):
            for owner in owners:
                for (model, tier), count in self._running(owner).items():
                    if (tier, owner) not in seen.get(model, ()):
                        head = heads[model, owner, tier]
                        users.add((model, owner, tier), head, count - head)
            users.cut()
            yield
        return users

    def _running(self, owner: str) -> dict[tuple[str, str], int]:
        """The leases of `owner`, by model and the tier that they are charged to."""
        found: dict[tuple[str, str], int] = {}
        for (model, said), count in self._leases.by_owner.get(owner, {}).items():
            account = self._rooms.account(model, owner, said)
            key = model, said if account is None else account.tier.name
            found[key] = found.get(key, 0) + count
        return found

    def _ranks(self, model: str) -> dict[str, int]:
        qos = self._rooms.qos_of(model)
        return {} if qos is None or not qos.enabled else {tier.name: tier.rank for tier in qos.tiers}

    def _user(self, user: _User, waiting: int, running: int) -> dict[str, Any]:
        model, name, tier = user
        account = self._rooms.account(model, name, tier)
        row: dict[str, Any] = {"model": model, "user": name, "tier": tier, "waiting": waiting, "running": running}
        return row | {"quota": None if account is None else account.quota}

    def _served(self, lease: Lease) -> dict[str, Any]:
        """A lease that stands, and the replicas that were weighed for it."""
        candidates = self._stories.candidates(lease.request.lease_id)
        chosen = next((c for c in candidates if c.state == "chosen"), None)
        others = [c for c in candidates if c.state == "possible"]
        second = min(others, key=lambda c: c.expected_seconds, default=None)
        return {
            **self._request(lease.request),
            "replica": lease.replica_id,
            "waited_seconds": round(lease.granted - lease.arrived, 3),
            "seconds": round(self._now - lease.granted, 2),
            "expected_seconds": None if chosen is None else round(chosen.expected_seconds, 3),
            "cached_tokens": 0 if chosen is None else chosen.cached_tokens,
            "next_best": None if second is None else second.replica,
            "next_best_seconds": None if second is None else round(second.expected_seconds, 3),
            "kept_out": {c.replica: c.state for c in candidates if c.state not in ("chosen", "possible")},
            "waits_in_engine": lease.request.lease_id in self._heads,
        }

    def _waiting(self, waiting: Waiting) -> dict[str, Any]:
        return {**self._request(waiting.request), "seconds": round(self._now - waiting.arrived, 2)}

    def _request(self, request: Acquire) -> dict[str, Any]:
        tier, account = self._rooms.home(request)
        return {
            "id": request.name.rpartition(".")[0],
            "model": request.model,
            "owner": request.owner,
            "user": request.sub,
            "tier": tier,
            "account": account,
            "prompt_tokens": request.prompt_tokens,
            "resumed_tokens": request.resumed_tokens,
        }


def _parts(names: Iterable[_Name]) -> Iterator[list[_Name]]:
    """All of them as they are now, SLICE at a time."""
    now = list(names)
    for at in range(0, len(now), SLICE):
        yield now[at : at + SLICE]


def _next(fleet: Fleet) -> Iterable[Waiting]:
    """Those that wait and come next."""
    if isinstance(fleet.queue, FairQueue):
        return fleet.queue.fronts(MOST_WAITING)
    return islice(fleet.queue, MOST_WAITING)
