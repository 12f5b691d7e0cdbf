"""What became of each of the last requests: where it stood, why it ran where it ran, what it cost, how long it took.

A request is known by its owner and the first characters of its id. The dispatcher tells of leases, the front, at the
end, of the request as its client saw it. What is remembered is bounded in every direction; a restart forgets it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from router.dispatch.lease import Acquire, Ended, Granted, Refused, Settle
from router.request_context import shown

MOST_REQUESTS = 4096
MOST_LEASES = 16  # of one request: its prompts, and their replays
MOST_PLACES = 16
MOST_CANDIDATES = 8
MOST_LOOKED_AT = 256  # for the last ones that ended
FIRST_LOOK = 0.2  # seconds after it came; then after twice as long each time


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica when a lease was granted: the score is what decided, or its state what kept it out."""

    replica: str
    state: str  # chosen | possible | full | excluded | suspect | draining
    expected_seconds: float  # to the last token
    first_token_seconds: float
    cached_tokens: int


@dataclass(slots=True)
class _Lease:
    """Seconds are counted from when the request first came."""

    front: str
    model: str
    prompt_tokens: int
    choices: int
    resumed_tokens: int
    came: float
    places: list[tuple[float, int]] = field(default_factory=list)
    state: str = "waiting"  # waiting | running | ended
    granted: tuple[float, Granted] | None = None
    candidates: tuple[Candidate, ...] = ()
    settled: Settle | None = None
    end: dict[str, Any] | None = None
    look: float = FIRST_LOOK

    def told(self) -> dict[str, Any]:
        places = [{"after_seconds": round(at, 3), "position": position} for at, position in self.places]
        return {
            "state": self.state,
            "front": self.front,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "choices": self.choices,
            "resumed_tokens": self.resumed_tokens,
            "positions": places,
            "candidates": [asdict(c) for c in self.candidates],
            "granted": None if self.granted is None else _granted(*self.granted),
            "end": None if self.end is None else {**self.end, **_bill(self.settled)},
        }


@dataclass(slots=True)
class _Story:
    id: str
    owner: str
    user: str
    tier: str
    account: str
    leases: dict[str, _Lease] = field(default_factory=dict)
    front: Ended | None = None

    def brief(self, now: float) -> dict[str, Any]:
        """What became of it, once `front` is known."""
        assert self.front is not None, "it has not ended"
        last = next(reversed(self.leases.values()), None)
        granted = None if last is None or last.granted is None else last.granted[1]
        ended = None if last is None or last.end is None else last.came + last.end["after_seconds"]
        return {
            "id": self.id,
            "owner": self.owner,
            "user": self.user,
            "tier": self.tier,
            "model": "" if last is None else last.model,
            "replica": None if granted is None else granted.replica.id,
            "outcome": self.front.outcome,
            "first_token_seconds": self.front.first_seconds,
            "seconds": round(sum(seconds for _, seconds in self.front.parts), 4),
            "prompt_tokens": self.front.prompt_tokens,
            "output_tokens": self.front.output_tokens,
            "ago": None if ended is None else round(now - ended, 2),
        }


class Stories:
    """The last requests. All times are the caller's clock, in seconds."""

    def __init__(self, most: int = MOST_REQUESTS) -> None:
        self._most = most
        self._stories: OrderedDict[tuple[str, str], _Story] = OrderedDict()
        self._by_lease: dict[str, _Lease] = {}  # those that have not ended
        self._last: dict[str, tuple[str, str]] = {}  # by id: the last owner's
        self._looks: list[tuple[float, str]] = []  # a heap: when to look where a lease stands

    def __len__(self) -> int:
        return len(self._stories)

    # what the dispatcher tells

    def asked(self, front: str, request: Acquire, tier: str, account: str, came: float) -> None:
        """`front` wants a lease, of a request that first came at `came`."""
        if not request.name:
            return
        story = self._story(request.owner, request.name.rpartition(".")[0])
        story.user, story.tier, story.account = request.sub, tier, account
        if len(story.leases) >= MOST_LEASES:
            return
        lease = _Lease(front, request.model, request.prompt_tokens, request.choices, request.resumed_tokens, came)
        story.leases[request.lease_id] = self._by_lease[request.lease_id] = lease
        heapq.heappush(self._looks, (came + FIRST_LOOK, request.lease_id))

    def due(self, now: float) -> str | None:
        """A waiting lease whose place is to be looked at, and told by `stands`; None: nobody's."""
        while self._looks and self._looks[0][0] <= now:
            lease_id = heapq.heappop(self._looks)[1]
            lease = self._by_lease.get(lease_id)
            if lease is not None and lease.state == "waiting" and len(lease.places) < MOST_PLACES:
                lease.look *= 2.0
                heapq.heappush(self._looks, (max(now, lease.came + lease.look), lease_id))
                return lease_id
        return None

    def stands(self, lease_id: str, position: int, now: float) -> None:
        """It is number `position` of those that wait."""
        lease = self._by_lease.get(lease_id)
        if lease is not None:
            lease.places.append((now - lease.came, position))

    def granted(self, granted: Granted, candidates: Iterable[Candidate], now: float) -> None:
        """It goes to one of `candidates`."""
        lease = self._by_lease.get(granted.lease_id)
        if lease is None:
            return
        lease.state = "running"
        lease.candidates = tuple(candidates)
        lease.granted = (now - lease.came, granted)

    def refused(self, refused: Refused, now: float) -> None:
        """There is no lease."""
        self._end(refused.lease_id, {"outcome": "refused", "reason": str(refused.reason), "why": refused.message}, now)

    def settled(self, settled: Settle, units: float, now: float) -> None:
        """It is over, and `units` of service were charged."""
        lease = self._by_lease.get(settled.lease_id)
        if lease is not None:
            lease.settled = settled
            self._end(settled.lease_id, {"outcome": str(settled.outcome), "units": round(units, 3)}, now)

    def dropped(self, lease_id: str, outcome: str, now: float) -> None:
        """It is over without a bill, if it was not over before."""
        self._end(lease_id, {"outcome": outcome, "units": 0.0}, now)

    # what the front tells

    def ended(self, front: Ended) -> None:
        """The request is over for its client."""
        story = self._stories.get((front.owner, front.request_id))
        if story is not None:
            story.front = front

    # who asks

    def tell(self, owner: str | None, request_id: str) -> dict[str, Any] | None:
        """All that is known of a request of `owner` (None: of anybody, the last of that id); None: nothing."""
        request_id = shown(request_id)
        key = self._last.get(request_id) if owner is None else (owner, request_id)
        story = None if key is None else self._stories.get(key)
        if story is None:
            return None
        states = {lease.state for lease in story.leases.values()}
        state = next((s for s in ("waiting", "running") if s in states), "ended")
        units = sum(lease.end.get("units", 0.0) for lease in story.leases.values() if lease.end)
        return {
            "id": story.id,
            "owner": story.owner,
            "user": story.user,
            "state": "ended" if story.front is not None else state,
            "tier": story.tier,
            "account": story.account,
            "leases": [lease.told() for lease in story.leases.values()],
            "units": round(units, 3),
            "preemptions": sum(lease.settled.preemptions for lease in story.leases.values() if lease.settled),
            **_front(story.front),
        }

    def candidates(self, lease_id: str) -> tuple[Candidate, ...]:
        """The replicas that were weighed for a lease that stands; none where they are not known."""
        lease = self._by_lease.get(lease_id)
        return () if lease is None else lease.candidates

    def ended_lately(self, most: int, now: float) -> list[dict[str, Any]]:
        """Of the last requests to come those that are over for their clients, the youngest first; `ago` in seconds."""
        found: list[dict[str, Any]] = []
        for story in islice(reversed(self._stories.values()), MOST_LOOKED_AT):
            if story.front is not None:
                found.append(story.brief(now))
                if len(found) == most:
                    break
        return found

    def waiting(self, owner: str | None, request_id: str) -> list[str]:
        """Ids of its leases that wait."""
        key = self._last.get(shown(request_id)) if owner is None else (owner, shown(request_id))
        story = None if key is None else self._stories.get(key)
        return [] if story is None else [i for i, lease in story.leases.items() if lease.state == "waiting"]

    # inside

    def _story(self, owner: str, request_id: str) -> _Story:
        key = (owner, request_id)
        story = self._stories.get(key)
        if story is None or story.front is not None:  # an id that is used again names the newer one
            self._forget(key)
            story = self._stories[key] = _Story(request_id, owner, "", "", "")
            self._last[request_id] = key
            if len(self._stories) > self._most:
                self._forget(next(iter(self._stories)))
        return story

    def _forget(self, key: tuple[str, str]) -> None:
        story = self._stories.pop(key, None)
        if story is None:
            return
        for lease_id in story.leases:
            self._by_lease.pop(lease_id, None)
        if self._last.get(story.id) == key:
            del self._last[story.id]

    def _end(self, lease_id: str, end: dict[str, Any], now: float) -> None:
        lease = self._by_lease.pop(lease_id, None)
        if lease is not None:
            lease.state = "ended"
            lease.end = {"after_seconds": round(now - lease.came, 4), **end}


def _granted(after: float, granted: Granted) -> dict[str, Any]:
    return {
        "after_seconds": round(after, 4),
        "replica": granted.replica.id,
        "predicted_first_token_seconds": granted.first_seconds,
        "predicted_seconds": granted.expected_seconds,
        "predicted_cached_tokens": granted.cached_tokens,
    }


def _bill(settled: Settle | None) -> dict[str, Any]:
    if settled is None:
        return {}
    return {
        "first_token_seconds": settled.first_seconds or None,
        "prefill_tokens": settled.prefill_tokens,
        "decode_tokens": settled.decode_tokens,
        "cached_tokens": settled.cached_tokens,
        "output_tokens": settled.output_tokens,
        "preemptions": settled.preemptions,
    }


def _front(front: Ended | None) -> dict[str, Any]:
    if front is None:
        return {"outcome": None, "seconds": None, "prompt_tokens": None, "cached_tokens": None, "output_tokens": None}
    parts = {name: round(seconds, 6) for name, seconds in front.parts}
    return {
        "outcome": front.outcome,
        "prompt_tokens": front.prompt_tokens,
        "cached_tokens": front.cached_tokens,
        "output_tokens": front.output_tokens,
        "first_token_seconds": front.first_seconds,
        "seconds": {**parts, "total": round(sum(parts.values()), 6)},
    }
