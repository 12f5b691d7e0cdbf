"""What happens now: who waits, who is served where and why, and who was done lately. For pages that ask once a second.

It is read from what the dispatcher keeps anyway, when somebody asks; whatever could be long is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

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
_NO_TIER = 1 << 30


class Activity:
    """At `now`, in the dispatcher's seconds."""

    def __init__(self, fleets: Iterable[Fleet], leases: Leases, rooms: Rooms, stories: Stories, now: float) -> None:
        self._fleets, self._leases, self._rooms = list(fleets), leases, rooms
        self._stories, self._now = stories, now
        # Leased, but they wait in an engine for their account's turn.
        self._heads = {i for fleet in self._fleets for r in fleet.replicas for i, _ in r.heads.values()}

    def of_all(self) -> dict[str, Any]:
        """For an operator. `waiting` are those that come next: where there are quotas, the first of each account."""
        served = sorted(self._leases.by_id.values(), key=lambda lease: lease.granted, reverse=True)
        users = self._users()
        tiers: dict[tuple[str, str], list[int]] = {}
        for user in users:
            counts = tiers.setdefault((user["model"], user["tier"]), [0, 0])
            counts[0] += user["waiting"]
            counts[1] += user["running"]
        return {
            "tiers": [{"model": m, "tier": t, "waiting": w, "running": r} for (m, t), (w, r) in tiers.items()],
            "users": users[:MOST_USERS],
            "more_users": max(len(users) - MOST_USERS, 0),
            "served": [self._served(lease) for lease in served[:MOST_SERVED]],
            "more_served": max(len(served) - MOST_SERVED, 0),
            "waiting": [self._waiting(w) for fleet in self._fleets for w in _next(fleet)],
            "ended": self._stories.ended_lately(MOST_ENDED, self._now),
        }

    def of_owner(self, owner: str, tier: str) -> dict[str, Any]:
        """How `owner`, whose API key says `tier`, stands at each model."""
        running: Counter[str] = Counter()
        heads: Counter[str] = Counter()
        for lease_id, lease in self._leases.by_id.items():
            if lease.request.owner == owner:
                (heads if lease_id in self._heads else running)[lease.request.model] += 1
        found = {}
        for fleet in self._fleets:
            account = self._rooms.account(fleet.model, owner, tier)
            found[fleet.model] = {
                "tier": tier if account is None else account.tier.name,
                "account": "" if account is None else account.id,
                "waiting": heads[fleet.model] + _queued_of(fleet, owner),
                "running": running[fleet.model],
            }
        return {"models": found}

    # inside

    def _users(self) -> list[dict[str, Any]]:
        """Whoever waits or runs, the higher tiers first, then who has most."""
        counts: dict[tuple[str, str, str], list[int]] = {}  # model, user, tier: waiting and running
        for fleet in self._fleets:
            for (tier, user), count in _queued(fleet).items():
                counts.setdefault((fleet.model, user, tier), [0, 0])[0] += count
        for lease_id, lease in self._leases.by_id.items():
            request = lease.request
            key = (request.model, request.owner, self._rooms.home(request)[0])
            counts.setdefault(key, [0, 0])[lease_id not in self._heads] += 1
        rows = []
        for (model, user, tier), (waiting, running) in counts.items():
            account = self._rooms.account(model, user, tier)
            rank = _NO_TIER if account is None else account.tier.rank
            row: dict[str, Any] = {"model": model, "user": user, "tier": tier, "waiting": waiting, "running": running}
            row["quota"] = None if account is None else account.quota
            rows.append((rank, -waiting - running, user, model, row))
        return [row for *_, row in sorted(rows, key=lambda r: r[:4])]

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


def _next(fleet: Fleet) -> Iterable[Waiting]:
    """Those that wait and come next."""
    if isinstance(fleet.queue, FairQueue):
        return fleet.queue.fronts(MOST_WAITING)
    return islice(fleet.queue, MOST_WAITING)


def _queued_of(fleet: Fleet, owner: str) -> int:
    """How many requests of `owner` wait."""
    if isinstance(fleet.queue, FairQueue):
        return sum(count for (_, user), count in fleet.queue.waiting_by_user.items() if user == owner)
    return sum(w.request.owner == owner for w in fleet.queue)


def _queued(fleet: Fleet) -> dict[tuple[str, str], int]:
    """How many wait, by tier and user."""
    if isinstance(fleet.queue, FairQueue):
        return fleet.queue.waiting_by_user
    return Counter((w.request.tier, w.request.owner) for w in fleet.queue)
