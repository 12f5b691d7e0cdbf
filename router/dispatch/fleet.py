"""All replicas of one model, and the requests that wait for one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.dispatch.latency import Speed
from router.dispatch.lease import Acquire, Refusal, Refused, ReplicaState
from router.dispatch.scaling import FleetLoad
from router.dispatch.served import ServedLedger
from router.dispatch.strategies import MinExpectedLatency, Strategy
from router.dispatch.table import Demand, Replica, blocks_needed
from router.qos.queue import Room

if TYPE_CHECKING:
    from router.dispatch.columns import Columns

_MANY = 80  # replicas of one shape, from which on arrays are quicker than a loop


@dataclass(slots=True)
class Waiting:
    """A request without a lease; `arrived` is when it first came, `queued` when it came to this queue."""

    request: Acquire
    client: str
    arrived: float
    queued: float


class Fleet:
    """The replicas of `model` in the order of registration. `empty_since` counts only while there is none; until
    `expected_until` somebody knows that one will come.
    """

    def __init__(self, model: str, room: Room[Waiting], margin: int) -> None:
        self.model = model
        self.replicas: list[Replica] = []
        self.queue = room
        self.served = ServedLedger()
        self.empty_since = self.expected_until = float("-inf")
        self._margin = margin
        self._context = self._most_slots = self._most_tokens = self._slots = 0
        self._alike = True
        self._has_foreign = False
        self._changed: set[Replica] = set()
        self._columns: Columns | None = None

    def add(self, replica: Replica) -> None:
        """`replica` may be chosen from now on."""
        self.replicas.append(replica)
        replica.changed = self._changed
        self._measure()

    def remove(self, replica: Replica, now: float) -> None:
        """`replica` is chosen no more."""
        self.replicas.remove(replica)
        self._measure()
        if not self.replicas:
            self.empty_since = now

    def _measure(self) -> None:
        infos = [r.info for r in self.replicas]
        self._context = max((i.max_model_len for i in infos), default=0)
        self._most_slots = max((i.max_num_seqs for i in infos), default=0)
        self._most_tokens = max((i.num_blocks * i.block_size for i in infos), default=0)
        self._slots = sum(i.max_num_seqs for i in infos)
        self._has_foreign = any(i.url for i in infos)
        self._alike = (
            not self._has_foreign
            and len({(i.max_model_len, i.max_num_seqs, i.num_blocks, i.block_size) for i in infos}) <= 1
        )
        self._changed.clear()
        self._columns = None

    def never(self, request: Acquire) -> Refused | None:
        """The refusal of a request that no replica could ever take; None while there are none."""
        if not self.replicas:
            return None
        if request.prompt_tokens >= self._context:
            text = f"the prompt has {request.prompt_tokens} tokens, the context of {self.model} {self._context}"
            return Refused(request.lease_id, Refusal.CONTEXT, text)
        if request.choices > self._most_slots:
            text = f"n = {request.choices}, but a replica of {self.model} runs at most {self._most_slots} sequences"
            return Refused(request.lease_id, Refusal.INVALID, text)
        known = request.prompt_tokens + request.resumed_tokens
        if known > self._most_tokens:
            text = f"{known} tokens, but the cache of a replica of {self.model} holds {self._most_tokens}"
            return Refused(request.lease_id, Refusal.INVALID, text)
        if not self._alike and not any(self._fits(request, r) for r in self.replicas):
            if self._has_foreign and not request.foreign:
                text = f"{self.model} is served by foreign nodes alone, which take whole requests over HTTP only"
                return Refused(request.lease_id, Refusal.INVALID, text)
            return Refused(request.lease_id, Refusal.INVALID, f"no single replica of {self.model} can hold it")
        return None

    @staticmethod
    def _fits(request: Acquire, replica: Replica) -> bool:
        info = replica.info
        known = request.prompt_tokens + request.resumed_tokens
        return (
            (request.foreign or not info.url)
            and request.prompt_tokens < info.max_model_len
            and request.choices <= info.max_num_seqs
            and known <= info.num_blocks * info.block_size
        )

    def place(
        self, request: Acquire, demand: Demand, strategy: Strategy, *, insist: bool, rank: int = 0
    ) -> Replica | None:
        """The replica for `request` of the tier `rank`, if one has room. Excluded ones only if there is no other and
        `insist`. Room that lower tiers would have to yield is taken only where none is free.
        """
        if self._alike and len(self.replicas) >= _MANY and not request.excluded:
            found = self._place_at_once(request, demand, strategy)
            if found is not None or not any(r.tiered for r in self.replicas):
                return found
        rows = self.replicas if self._alike else [r for r in self.replicas if self._fits(request, r)]
        if request.excluded:
            others = [r for r in rows if r.info.id not in request.excluded]
            if others or not insist:
                rows = others
        choices, size, blocks = request.choices, 0, 0
        candidates: list[Replica] = []
        by_force: list[Replica] = []  # lower tiers would have to yield
        for r in rows:
            free_slots, free_blocks = r.room(rank)
            if free_slots >= choices:
                if r.block_size != size:
                    size = r.block_size
                    blocks = blocks_needed(request, size, self._margin)
                if free_blocks >= blocks or free_blocks == r.info.num_blocks:  # margins never keep it out for ever
                    free = r.free_slots >= choices and r.free_blocks >= min(blocks, free_blocks)
                    (candidates if free else by_force).append(r)
        rows = candidates or by_force
        return strategy.choose(rows, demand) if rows else None

    def _place_at_once(self, request: Acquire, demand: Demand, strategy: Strategy) -> Replica | None:
        """The same where room is free, for many replicas of one shape."""
        columns = self._columns
        if columns is None:
            from router.dispatch.columns import Columns  # numpy: only those with large fleets pay for it

            columns = self._columns = Columns(self.replicas, self._changed)
        free = columns.free(request.choices, blocks_needed(request, self.replicas[0].block_size, self._margin))
        if not free.any():
            return None
        if isinstance(strategy, MinExpectedLatency):
            return columns.least_expected(free, demand)
        return strategy.choose(columns.those(free), demand)

    def place_head(
        self, request: Acquire, demand: Demand, strategy: Strategy, account: tuple[str, ...]
    ) -> Replica | None:
        """The replica in whose engine `request` waits for its `account`, if there is one where none does."""
        rows = [
            r
            for r in self.replicas
            if r.takes_head(account) and r.info.id not in request.excluded and self._fits(request, r)
        ]
        return strategy.choose(rows, demand) if rows else None

    def speed(self, seed: Speed) -> Speed:
        """The mean of what was measured, in times; `seed` if nothing was."""
        seen = [r.model.speed for r in self.replicas if r.model.known]
        if not seen:
            return seed
        n = len(seen)
        return Speed(
            prefill_rate=n / sum(1.0 / s.prefill_rate for s in seen),
            base=sum(s.base for s in seen) / n,
            per_seq=sum(s.per_seq for s in seen) / n,
            per_kv=sum(s.per_kv for s in seen) / n,
        )

    def load(self, hold_seconds: float, now: float) -> FleetLoad:
        """How busy those that take leases are, while a lease lasts `hold_seconds`."""
        ready = [r for r in self.replicas if r.state is ReplicaState.READY and not r.info.url]
        backlogs = [r.queue_seconds + max(r.step_ends - now, 0.0) for r in ready]
        shares = [max(r.slots / r.info.max_num_seqs, r.blocks / r.info.num_blocks) for r in ready]
        waiting = len(self.queue)
        slots = sum(r.info.max_num_seqs for r in ready)
        wait = hold_seconds * waiting / max(slots, 1) + min(backlogs, default=0.0)
        return FleetLoad(len(ready), waiting, wait, sum(shares) / max(len(ready), 1))

    def pace(self, hold_seconds: float) -> float:
        """Seconds between two releases, while all slots are taken and a lease lasts `hold_seconds`."""
        return hold_seconds / max(self._slots, 1)

    def retry_after(self, hold_seconds: float, ahead: int) -> float:
        """Seconds until `ahead` requests of the queue have been served, within 1 and 60."""
        return min(max(self.pace(hold_seconds) * (ahead + 1), 1.0), 60.0)
